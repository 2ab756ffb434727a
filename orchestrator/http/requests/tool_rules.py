"""Rules for tools and their calls, in the form of OpenAI's chats, and what the front channel gets of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.protocol.client.results import ToolCall, ToolCallPart
from mgpu.protocol.front.chat_messages import TOOL_CHOICE, TOOL_CHOICES
from mgpu.protocol.front.fields import FieldError, shown, wrong


@dataclass(frozen=True, slots=True)
class ChatToolChoice:
    """A word, or the function that must be called; also in the form of responses, without `function`."""

    allowed: str = 'auto, none, required, or {"type": "function", "function": {"name": "f"}}'

    def parse(self, field: str, value: object) -> object:
        if isinstance(value, Mapping):
            function = value.get("function", value)
            name = function.get("name") if isinstance(function, Mapping) else None
            if value.get("type", "function") != "function" or name is None:
                raise wrong(field, value, self.allowed)
            return TOOL_CHOICE.parse(field, {"name": name})
        if not isinstance(value, str) or value not in TOOL_CHOICES:
            raise wrong(field, value, self.allowed)
        return value


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
