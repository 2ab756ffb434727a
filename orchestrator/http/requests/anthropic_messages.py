"""Rules for Anthropic's messages and tools, and what the front channel gets of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.orchestrator.http.requests.rules import MAX_MESSAGES, ROLES, parse_content, parse_part
from mgpu.orchestrator.http.requests.tool_rules import parse_tools
from mgpu.protocol.front.chat_messages import TOOL_CHOICE
from mgpu.protocol.front.fields import FieldError, shown, wrong

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class AnthropicMessages:
    """Turns whose content is text or blocks. Returns messages of the front channel."""

    allowed: str = f"an array of 1 to {MAX_MESSAGES} messages, each with role and content"

    def parse(self, field: str, value: object) -> list[dict[str, object]]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
            raise wrong(field, value, self.allowed)
        return [turn for at, message in enumerate(value) for turn in _turns(f"{field}[{at}]", message)]


def _turns(field: str, message: object) -> list[dict[str, object]]:
    if not isinstance(message, Mapping):
        raise wrong(field, message, 'an object such as {"role": "user", "content": "Hi"}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise wrong(f"{field}.role", role, "one of " + ", ".join(ROLES))
    if "content" not in message:
        raise FieldError(f"{field} lacks content")
    if not isinstance(content, list):
        return [{"role": role, "content": parse_content(f"{field}.content", content)}]
    blocks = [_block(f"{field}.content[{at}]", block) for at, block in enumerate(content)]
    return _answer(blocks) if role == "assistant" else _results(role, blocks)


@dataclass(frozen=True, slots=True)
class _Block:
    text: str = ""
    reasoning: str = ""
    call: dict[str, object] | None = None
    result: dict[str, object] | None = None


def _block(field: str, block: object) -> _Block:
    kind = block.get("type", "text") if isinstance(block, Mapping) else "text"
    if not isinstance(block, Mapping) or kind not in ("tool_use", "tool_result", "thinking", "redacted_thinking"):
        return _Block(parse_part(field, block))
    if kind == "thinking":
        return _Block(reasoning=parse_content(f"{field}.thinking", block.get("thinking")))
    if kind == "tool_use":
        arguments = block.get("input") or {}
        if not isinstance(arguments, Mapping):
            raise wrong(f"{field}.input", arguments, "an object")
        function = {"name": block.get("name"), "arguments": arguments}
        return _Block(call={"id": block.get("id"), "type": "function", "function": function})
    if kind == "tool_result":
        if not isinstance(block.get("tool_use_id"), str):
            raise FieldError(f"{field} lacks tool_use_id, the id of the tool_use whose result it is")
        text = parse_content(f"{field}.content", block.get("content"))
        text = f"Error: {text}" if block.get("is_error") is True else text
        return _Block(result={"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
    return _Block()


def _answer(blocks: list[_Block]) -> list[dict[str, object]]:
    turn: dict[str, object] = {"role": "assistant", "content": "\n".join(each.text for each in blocks if each.text)}
    if reasoning := "\n".join(each.reasoning for each in blocks if each.reasoning):
        turn["reasoning_content"] = reasoning
    if calls := [each.call for each in blocks if each.call is not None]:
        turn["tool_calls"] = calls
    return [turn]


def _results(role: object, blocks: list[_Block]) -> list[dict[str, object]]:
    """Return the results of calls, each as a message, and then the text."""
    turns = [each.result for each in blocks if each.result is not None]
    texts = [each.text for each in blocks if each.text]
    if texts or not turns:
        turns.append({"role": role, "content": "\n".join(texts)})
    return turns


@dataclass(frozen=True, slots=True)
class AnthropicTools:
    """Tools with `input_schema`. Returns them in OpenAI's form."""

    allowed: str = 'an array of tools such as {"name": "f", "description": "…", "input_schema": {JSON schema}}'

    def parse(self, field: str, value: object) -> object:
        return parse_tools(field, value, self.allowed, _tool)


def _tool(field: str, tool: object) -> dict[str, object]:
    if not isinstance(tool, Mapping):
        raise wrong(field, tool, 'an object such as {"name": "f", "input_schema": {…}}')
    if (kind := tool.get("type") or "custom") != "custom":
        raise FieldError(f"{field}.type is {shown(kind)}; this server calls tools of the client only: leave type out")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class AnthropicToolChoice:
    """Returns the choice and whether several calls may come."""

    allowed: str = '{"type": "auto"}, {"type": "any"}, {"type": "none"} or {"type": "tool", "name": "f"}'

    def parse(self, field: str, value: object) -> tuple[object, bool]:
        kind = value.get("type") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(kind, str) or kind not in (*_CHOICES, "tool"):
            raise wrong(field, value, self.allowed)
        is_parallel = value.get("disable_parallel_tool_use") is not True
        if kind == "tool":
            return TOOL_CHOICE.parse(field, {"name": value.get("name")}), is_parallel
        return _CHOICES[kind], is_parallel
