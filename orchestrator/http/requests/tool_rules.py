"""Rules for tools and their calls, in the form of OpenAI's chats, and what the front channel gets of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mgpu.protocol.client.requests.results import ToolCall, ToolCallPart
from mgpu.protocol.front.chat_messages import TOOL_CHOICE, TOOL_CHOICES, TOOLS
from mgpu.protocol.front.fields import FieldError, shown, wrong


@dataclass(frozen=True, slots=True)
class AllowedTools:
    """Some of the tools that are offered, and whether one of them must be called."""

    mode: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ToolChoiceField:
    """A word, the function that must be called, or those that may be; in the form of chats or of responses.

    Returns the front channel's form, or `AllowedTools`.
    """

    allowed: str = 'auto, none, required, or {"type": "function", "function": {"name": "f"}}'

    def parse(self, field: str, value: object) -> object:
        if isinstance(value, Mapping):
            if value.get("type") == "allowed_tools":
                return self._allowed_tools(field, value.get("allowed_tools", value))
            return TOOL_CHOICE.parse(field, {"name": self._name(field, value)})
        if not isinstance(value, str) or value not in TOOL_CHOICES:
            raise wrong(field, value, self.allowed)
        return value

    def _name(self, field: str, value: object) -> str:
        function = value.get("function", value) if isinstance(value, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(value, Mapping) or value.get("type", "function") != "function" or not isinstance(name, str):
            raise wrong(field, value, self.allowed)
        return name

    def _allowed_tools(self, field: str, value: object) -> AllowedTools:
        tools = value.get("tools") if isinstance(value, Mapping) else None
        if (
            not isinstance(value, Mapping)
            or value.get("mode") not in ("auto", "required")
            or not isinstance(tools, list)
        ):
            raise FieldError(f'{field} of type allowed_tools must have a mode, "auto" or "required", and tools')
        return AllowedTools(
            value["mode"], tuple(self._name(f"{field}.tools[{at}]", each) for at, each in enumerate(tools))
        )


def parse_tools(
    field: str, value: object, allowed: str, in_chat_form: Callable[[str, object], dict[str, object]]
) -> object:
    """Return the checked tools of another form than that of chats, which ``in_chat_form`` makes of each."""
    if not isinstance(value, list):
        raise wrong(field, value, allowed)
    return TOOLS.parse(field, [in_chat_form(f"{field}[{at}]", tool) for at, tool in enumerate(value)])


Choice = str | Mapping[str, object] | None


def choose(
    choice: AllowedTools | Choice, tools: Sequence[Mapping[str, Any]]
) -> tuple[Choice, Sequence[Mapping[str, Any]]]:
    """Return the front channel's choice and the tools that are left to it. FieldError for a name without a tool."""
    if not isinstance(choice, AllowedTools):
        return choice, tools
    offered = {tool["function"]["name"]: tool for tool in tools}
    if missing := [name for name in choice.names if name not in offered]:
        raise FieldError(f"tool_choice names {shown(missing[0])}, which is not among the tools: {', '.join(offered)}")
    return choice.mode, [offered[name] for name in dict.fromkeys(choice.names)]


def parse_calls(field: str, value: object) -> list[object]:
    """Return the calls of an assistant's message with their arguments as objects."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong(field, value, "an array of tool calls")
    return [_parse_call(f"{field}[{at}]", call) for at, call in enumerate(value)]


def _parse_call(field: str, call: object) -> dict[str, object]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise wrong(field, call, 'an object such as {"id": "a1", "type": "function", "function": {"name": "f"}}')
    arguments = parse_arguments(f"{field}.function.arguments", function.get("arguments"))
    named = {"name": function.get("name"), "arguments": arguments}
    return {"id": call.get("id"), "type": call.get("type", "function"), "function": named}


def parse_arguments(field: str, value: object) -> Mapping[str, object]:
    """Return the arguments of a call as an object; clients send them as the text of one."""
    if isinstance(value, Mapping):
        return value
    if value is None or value == "":
        return {}
    if not isinstance(value, str):
        raise wrong(field, value, "a string with a JSON object")
    try:
        found = json.loads(value)
    except RecursionError:
        raise FieldError(f"{field} is nested too deeply") from None
    except ValueError as error:
        raise FieldError(f"{field} must be a string with a JSON object: {str(error)[:100]}") from None
    if not isinstance(found, Mapping):
        raise FieldError(f"{field} must be a string with a JSON object, got {shown(found)} in it")
    return found


def call_body(call: ToolCall) -> dict[str, object]:
    """Return OpenAI's form of a call."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_text}}


def call_delta(part: ToolCallPart) -> dict[str, object]:
    """Return OpenAI's form of a part of a call."""
    if part.id:
        head = {"id": part.id, "type": "function"}
        return {"index": part.index, **head, "function": {"name": part.name, "arguments": part.arguments}}
    return {"index": part.index, "function": {"arguments": part.arguments}}
