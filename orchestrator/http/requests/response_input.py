"""The input of OpenAI's responses: items of a conversation, and the chat messages that the front channel gets of them.

Theory. A turn of the model is several items there: its reasoning, its message, and each of its calls. A chat has one
message for all of them. So an item of the model joins the turn before it, if that is the model's and lacks this part:

    reasoning, message, function_call, function_call, function_call_output, function_call_output, message
    └────────────── one assistant ───────────────┘    └─ tool ─┘            └─ tool ─┘            user or assistant
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.orchestrator.http.requests.rules import MAX_MESSAGES, ROLES, parse_content
from mgpu.orchestrator.http.requests.tool_rules import parse_arguments, parse_tools
from mgpu.protocol.front.fields import FieldError, shown, wrong

Turn = dict[str, object]
_KINDS = ("message", "function_call", "function_call_output", "reasoning")
REASONING_PARTS = ("reasoning_text", "summary_text", "text")


@dataclass(frozen=True, slots=True)
class Input:
    """A text, or items. Returns chat messages."""

    allowed: str = f"a string, or an array of 1 to {MAX_MESSAGES} items of type {', '.join(_KINDS)}"

    def parse(self, field: str, value: object) -> list[Turn]:
        if isinstance(value, str):
            return [{"role": "user", "content": parse_content(field, value)}]
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
            raise wrong(field, value, self.allowed)
        turns: list[Turn] = []
        call_ids: set[object] = set()
        for at, item in enumerate(value):
            _add(turns, call_ids, f"{field}[{at}]", item)
        return [{"content": "", **turn} for turn in turns]


def _add(turns: list[Turn], call_ids: set[object], field: str, item: object) -> None:
    if not isinstance(item, Mapping):
        raise wrong(field, item, 'an object such as {"role": "user", "content": "Hi"}')
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(turns, field, item)
    elif kind == "reasoning":
        turn = _turn_without(turns, "reasoning_content", "content", "tool_calls")
        turn["reasoning_content"] = _reasoning(field, item)
    elif kind == "function_call":
        call = _call(field, item)
        call_ids.add(call["id"])
        calls = _turn_without(turns).setdefault("tool_calls", [])
        assert isinstance(calls, list)
        calls.append(call)
    elif kind == "function_call_output":
        turns.append(_result(field, item, call_ids))
    else:
        raise FieldError(f"{field}.type is {shown(kind)}: this server takes items of type {', '.join(_KINDS)}")


def _add_message(turns: list[Turn], field: str, item: Mapping[str, object]) -> None:
    role = item.get("role")
    if role not in ROLES:
        raise wrong(f"{field}.role", role, "one of " + ", ".join(ROLES))
    content = parse_content(f"{field}.content", item.get("content"))
    if role == "assistant":
        _turn_without(turns, "content", "tool_calls")["content"] = content
    else:
        turns.append({"role": role, "content": content})


def _turn_without(turns: list[Turn], *names: str) -> Turn:
    """Return the last turn if it is the model's and lacks these parts, else a new turn of the model."""
    if not turns or turns[-1]["role"] != "assistant" or any(name in turns[-1] for name in names):
        turns.append({"role": "assistant"})
    return turns[-1]


def _reasoning(field: str, item: Mapping[str, object]) -> str:
    """Return the text of a reasoning item; that of its summary if it has no other."""
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list):
            raise wrong(f"{field}.{name}", parts, "an array of parts")
        if any(not isinstance(part, Mapping) or part.get("type") not in REASONING_PARTS for part in parts):
            raise FieldError(f'{field}.{name} must have parts such as {{"type": "reasoning_text", "text": "…"}}')
        if parts:
            return "\n".join(parse_content(f"{field}.{name}", part.get("text")) for part in parts)
    return ""


def _call(field: str, item: Mapping[str, object]) -> dict[str, object]:
    if not isinstance(item.get("call_id"), str):
        raise FieldError(f"{field} lacks call_id, the id by which its function_call_output names it")
    arguments = parse_arguments(f"{field}.arguments", item.get("arguments"))
    return {
        "id": item["call_id"],
        "type": "function",
        "function": {"name": item.get("name"), "arguments": arguments},
    }


def _result(field: str, item: Mapping[str, object], call_ids: set[object]) -> Turn:
    call_id = item.get("call_id")
    if not isinstance(call_id, str):
        raise FieldError(f"{field} lacks call_id, the one of the function_call whose output it is")
    if call_id not in call_ids:
        raise FieldError(
            f"{field}.call_id is {shown(call_id)}, but no function_call before it has this call_id; "
            "send that item too, since this server keeps no responses"
        )
    return {"role": "tool", "tool_call_id": call_id, "content": parse_content(f"{field}.output", item.get("output"))}


@dataclass(frozen=True, slots=True)
class ResponseTools:
    """Tools whose name and parameters stand beside the type. Returns them in the form of chats."""

    allowed: str = 'an array of tools such as {"type": "function", "name": "f", "parameters": {JSON schema}}'

    def parse(self, field: str, value: object) -> object:
        return parse_tools(field, value, self.allowed, _tool)


def _tool(field: str, tool: object) -> dict[str, object]:
    if not isinstance(tool, Mapping):
        raise wrong(field, tool, 'an object such as {"type": "function", "name": "f"}')
    if (kind := tool.get("type")) != "function":
        raise FieldError(
            f"{field}.type is {shown(kind)}; this server runs no tools of its own, only functions of the client"
        )
    function = tool.get("function", tool)  # some clients send the form of chats
    if not isinstance(function, Mapping):
        raise wrong(f"{field}.function", function, "an object")
    known = {name: function.get(name) for name in ("name", "description", "parameters")}
    return {"type": "function", "function": known}
