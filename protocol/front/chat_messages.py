"""Rules for a chat: its messages, its tools and what else a chat template can see.

Everything is bounded, since all of it comes from clients: numbers of messages, tools and calls, the depth of what is
nested, and names. The size of a frame bounds the bytes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from mgpu.protocol.front.fields import Array, FieldError, Flag, OneOf, Rule, Text, parse_fields, shown, wrong

MAX_TEXT_CHARS = 2**27 - 1
"""Bound of one string; the frame size is the tighter one."""
MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_CALLS = 128
"""In one message."""
MAX_DOCUMENTS = 256
MAX_OPTIONS = 64
MAX_DEPTH = 32
"""Arrays and maps within each other."""
TOOL_CHOICES = ("auto", "none", "required")

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_OPTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class ToolName:
    allowed: str = "1 to 64 letters, digits, _ or -"

    def parse(self, field: str, value: object) -> str:
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise wrong(field, value, self.allowed)
        return value


@dataclass(frozen=True, slots=True)
class Json:
    """Any value that JSON has."""

    allowed: str = f"a value as in JSON, nested up to {MAX_DEPTH} deep"

    def parse(self, field: str, value: object) -> object:
        return _json(field, value, 0)


@dataclass(frozen=True, slots=True)
class JsonMap:
    """A map of values as in JSON."""

    allowed: str = f"a map of values as in JSON, nested up to {MAX_DEPTH} deep"

    def parse(self, field: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, self.allowed)
        return cast("dict[str, object]", _json(field, value, 0))


def _json(field: str, value: object, depth: int) -> object:
    """Return a copy of a value as in JSON. FieldError for anything else."""
    if isinstance(value, str):
        return Text(MAX_TEXT_CHARS).parse(field, value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise wrong(field, value, "a value as in JSON")
    if depth == MAX_DEPTH:
        raise FieldError(f"{field[:200]} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {_key(field, key): _json(f"{field}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(f"{field}[{at}]", item, depth + 1) for at, item in enumerate(value)]
    raise wrong(field[:200], value, "a value as in JSON")


def _key(field: str, key: object) -> str:
    if not isinstance(key, str):
        raise FieldError(f"{field[:200]} has the key {shown(key)}; keys are strings")
    return Text(MAX_TEXT_CHARS).parse(field, key)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model has made earlier. OpenAI's form."""

    allowed: str = 'a map such as {"id": "a1", "function": {"name": "f", "arguments": {}}}'

    def parse(self, field: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, self.allowed)
        rules: dict[str, Rule] = {"id": Text(256), "type": OneOf(("function",)), "function": Json()}
        call = parse_fields(value, rules, field + ".")
        if not isinstance(function := value.get("function"), Mapping):
            raise FieldError(f"{field} lacks function; it must be {self.allowed}")
        named = parse_fields(function, {"name": ToolName(), "arguments": JsonMap()}, f"{field}.function.")
        if "name" not in named:
            raise FieldError(f"{field}.function lacks name")
        call["function"] = {**named, "arguments": named.get("arguments", {})}  # in the order of the client
        call.setdefault("type", "function")
        return call


_MESSAGE_RULES: dict[str, Rule] = {
    "role": OneOf(("system", "developer", "user", "assistant", "tool")),
    "content": Text(MAX_TEXT_CHARS),
    "name": Text(256),
    "reasoning_content": Text(MAX_TEXT_CHARS),
    "tool_calls": Array(ToolCall(), MAX_CALLS),
    "tool_call_id": Text(256),
}
_MESSAGE_WORDS = (
    "a map of role: one of system, developer, user, assistant, tool; content; name; of an assistant reasoning_content "
    "and tool_calls; of a tool tool_call_id"
)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A turn. The content of a message with tool calls may be missing; it becomes an empty text."""

    allowed: str = _MESSAGE_WORDS

    def parse(self, field: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, "a map")
        parsed = parse_fields(value, _MESSAGE_RULES, field + ".")
        calls = list(cast("Sequence[object]", parsed.pop("tool_calls", ())))
        if calls and "content" not in parsed:
            parsed["content"] = ""
        missing = [name for name in ("role", "content") if name not in parsed]
        if missing:
            raise FieldError(f"{field} lacks {', '.join(missing)}")
        role = parsed["role"]
        for name, given in (("tool_calls", calls), ("reasoning_content", parsed.get("reasoning_content"))):
            if given and role != "assistant":
                raise FieldError(f"{field} has {name}, but its role is {role}; only an assistant has {name}")
        if "tool_call_id" in parsed and role != "tool":
            raise FieldError(f"{field} has tool_call_id, but its role is {role}; only a tool has it")
        return {**parsed, "tool_calls": calls} if calls else parsed


@dataclass(frozen=True, slots=True)
class Chat:
    """All turns. A result that names its call must follow it."""

    allowed: str = f"an array of 1 to {MAX_MESSAGES} values, each {_MESSAGE_WORDS}"

    def parse(self, field: str, value: object) -> tuple[dict[str, object], ...]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_MESSAGES:
            raise wrong(field, value, self.allowed)
        messages = tuple(ChatMessage().parse(f"{field}[{at}]", message) for at, message in enumerate(value))
        ids: set[object] = set()
        for at, message in enumerate(messages):
            calls = cast("Sequence[Mapping[str, object]]", message.get("tool_calls", ()))
            ids.update(call["id"] for call in calls if "id" in call)
            if (call_id := message.get("tool_call_id")) is not None and call_id not in ids:
                text = f"{field}[{at}].tool_call_id is {shown(call_id)}, but no message before it has a call of this id"
                raise FieldError(f"{text}; send the assistant's message that has it")
        return messages


@dataclass(frozen=True, slots=True)
class Tools:
    """Functions that the model may call. OpenAI's form. Returns them as a template gets them."""

    allowed: str = (
        f"an array of 0 to {MAX_TOOLS} functions of different names, each "
        '{"type": "function", "function": {"name": "f", "description": "…", "parameters": {JSON schema}}}'
    )

    def parse(self, field: str, value: object) -> tuple[dict[str, object], ...]:
        if not isinstance(value, (list, tuple)):
            raise wrong(field, value, self.allowed)
        if len(value) > MAX_TOOLS:
            raise FieldError(
                f"{field} has {len(value)} functions, the limit is {MAX_TOOLS}; send those that are needed"
            )
        tools = tuple(self._tool(f"{field}[{at}]", tool) for at, tool in enumerate(value))
        places: dict[object, int] = {}
        for at, tool in enumerate(tools):
            name = cast("Mapping[str, object]", tool["function"])["name"]
            if name in places:
                raise FieldError(f"{field}[{at}].function.name is {name!r}, as that of {field}[{places[name]}]")
            places[name] = at
        return tools

    def _tool(self, field: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, 'a map such as {"type": "function", "function": {"name": "f"}}')
        kind = value.get("type", "function")
        if kind != "function":
            raise FieldError(f"{field}.type is {shown(kind)}; this server calls functions only")
        function = value.get("function")
        if not isinstance(function, Mapping):
            raise FieldError(f'{field} lacks function, a map such as {{"name": "f", "parameters": {{…}}}}')
        where = f"{field}.function"
        named = JsonMap().parse(where, {key: item for key, item in function.items() if item is not None})
        named.pop("strict", None)  # about the answer, not for the model
        if "name" not in named:
            raise FieldError(f"{where} lacks name")
        ToolName().parse(f"{where}.name", named["name"])
        Text(MAX_TEXT_CHARS).parse(f"{where}.description", named.get("description", ""))
        parameters = named.setdefault("parameters", {"type": "object", "properties": {}})
        if not isinstance(parameters, dict):
            raise wrong(f"{where}.parameters", parameters, "a map with a JSON schema of type object")
        if parameters.get("type", "object") != "object":
            raise wrong(f"{where}.parameters.type", parameters["type"], '"object"')
        return {"type": "function", "function": named}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call a tool, or which one it must call."""

    allowed: str = 'auto, none, required, or {"name": "f"} with the name of a tool'

    def parse(self, field: str, value: object) -> str | dict[str, str]:
        if isinstance(value, Mapping) and set(value) == {"name"}:
            return {"name": ToolName().parse(f"{field}.name", value["name"])}
        if not isinstance(value, str) or value not in TOOL_CHOICES:
            raise wrong(field, value, self.allowed)
        return value


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """Variables of the chat template. Those that many templates know have a type."""

    rules: Mapping[str, Rule]
    allowed: str = f"a map of up to {MAX_OPTIONS} variables of the chat template, each a value as in JSON"

    def parse(self, field: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping) or len(value) > MAX_OPTIONS:
            raise wrong(field, value, self.allowed)
        for name in value:
            if not isinstance(name, str) or not _OPTION_NAME.fullmatch(name):
                raise FieldError(f"{field} has the name {shown(name)}; names are letters, digits and _")
            if name in _RESERVED:
                raise FieldError(f"{field} must not have {name}, which the server sets from the request itself")
        return {
            name: self.rules.get(name, Json()).parse(f"{field}.{name}", item)
            for name, item in value.items()
            if item is not None
        }


CHAT = Chat()
TOOLS = Tools()
TOOL_CHOICE = ToolChoice()
DOCUMENTS = Array(JsonMap(), MAX_DOCUMENTS)
TEMPLATE_OPTIONS = TemplateOptions(
    {"enable_thinking": Flag(), "thinking": Flag(), "reasoning_effort": Text(32), "date_string": Text(64)}
)


def check_choice(tools: Sequence[Mapping[str, object]] | None, choice: object) -> None:
    """Raise FieldError if a tool must be called that is not offered."""
    names = [cast("Mapping[str, str]", tool["function"])["name"] for tool in tools or ()]
    if choice == "required" and not names:
        raise FieldError("tool_choice is required, but the request offers no tools")
    if isinstance(choice, Mapping) and choice["name"] not in names:
        offered = ", ".join(names[:10]) or "none"
        raise FieldError(f"tool_choice names {choice['name']!r}, which is not among the tools: {offered}")
