"""Rules for fields that have another form in HTTP. Each `parse` returns the front channel's form."""

from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.orchestrator.http.requests.tool_rules import parse_calls
from mgpu.protocol.front.fields import INT32_MAX, Array, FieldError, Flag, Integer, Number, Rule, Text, wrong

MAX_PROMPTS = 256
_STOP = Array(Text(256, 1), 16)
_BIAS = Number(-100, 100)
_MAX_BIASES = 1024
_TOKEN_ID = Integer(0, INT32_MAX)
_TEXT = Text(2**27 - 1)
_PROMPT = Text(2**27 - 1, 1)
ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
"""A tuple: what a body names may be of a type that no set can look up."""
MAX_MESSAGES = 2048


@dataclass(frozen=True, slots=True)
class Stop:
    allowed: str = f"a string, or {_STOP.allowed}"

    def parse(self, field: str, value: object) -> object:
        return _STOP.parse(field, [value] if isinstance(value, str) else value)


@dataclass(frozen=True, slots=True)
class Seed:
    """A seed may be negative in OpenAI's API; the front channel has unsigned ones."""

    allowed: str = "an integer of 64 bits"

    def parse(self, field: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**64:
            raise wrong(field, value, self.allowed)
        return value % 2**64


@dataclass(frozen=True, slots=True)
class LogitBias:
    allowed: str = f"an object of up to {_MAX_BIASES} token ids, each with {_BIAS.allowed}"

    def parse(self, field: str, value: object) -> list[list[object]]:
        if not isinstance(value, Mapping) or len(value) > _MAX_BIASES:
            raise wrong(field, value, self.allowed)
        return [[self._token_id(field, key), _BIAS.parse(f"{field}.{key[:20]}", bias)] for key, bias in value.items()]

    def _token_id(self, field: str, key: str) -> int:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise FieldError(f'{field} has the key {key[:40]!a}; keys are token ids, such as "50256"')
        return _TOKEN_ID.parse(field, int(key))


@dataclass(frozen=True, slots=True)
class Maybe:
    """``other`` value, or what ``rule`` allows. Returns None for ``other``."""

    rule: Rule
    other: bool

    @property
    def allowed(self) -> str:
        return f"{'true' if self.other else 'false'}, or {self.rule.allowed}"

    def parse(self, field: str, value: object) -> object:
        return None if value is self.other else self.rule.parse(field, value)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt or several, as text or token ids. Returns a list of strings and lists of token ids."""

    allowed: str = f"a string, an array of token ids, or an array of 1 to {MAX_PROMPTS} of these"

    def parse(self, field: str, value: object) -> list[object]:
        if isinstance(value, str):
            return [_PROMPT.parse(field, value)]
        if not isinstance(value, list) or not value:
            raise wrong(field, value, self.allowed)
        if isinstance(value[0], int):
            return [self._ids(field, value)]
        if len(value) > MAX_PROMPTS:
            raise wrong(field, value, self.allowed)
        return [
            _PROMPT.parse(f"{field}[{at}]", one) if isinstance(one, str) else self._ids(f"{field}[{at}]", one)
            for at, one in enumerate(value)
        ]

    def _ids(self, field: str, value: object) -> list[int]:
        if not isinstance(value, list) or not value:
            raise wrong(field, value, "a string or an array of token ids")
        if all(type(each) is int and 0 <= each <= INT32_MAX for each in value):
            return value  # without a name for each of thousands
        return [_TOKEN_ID.parse(f"{field}[{at}]", token_id) for at, token_id in enumerate(value)]


def parse_content(field: str, value: object) -> str:
    """Return the text of a message: a string, or parts whose texts are joined by line breaks."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _TEXT.parse(field, value)
    if not isinstance(value, list):
        raise wrong(field, value, "a string or an array of parts")
    return "\n".join(parse_part(f"{field}[{at}]", part) for at, part in enumerate(value))


def parse_part(field: str, part: object) -> str:
    """Return the text of one part."""
    if isinstance(part, str):
        return _TEXT.parse(field, part)
    if not isinstance(part, Mapping):
        raise wrong(field, part, 'an object such as {"type": "text", "text": "Hi"}')
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise FieldError(
            f"{field}.type is {str(kind)[:40]!a}: this server takes text only, no images, audio or files; "
            'send {"type": "text", "text": "…"}'
        )
    return _TEXT.parse(f"{field}.{'refusal' if kind == 'refusal' else 'text'}", part.get("text", part.get("refusal")))


@dataclass(frozen=True, slots=True)
class Messages:
    """Chat turns. Returns those of the front channel; fields that it does not know are left out."""

    allowed: str = f"an array of 1 to {MAX_MESSAGES} messages, each with role and content"

    def parse(self, field: str, value: object) -> list[dict[str, object]]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
            raise wrong(field, value, self.allowed)
        return [self._message(f"{field}[{at}]", message) for at, message in enumerate(value)]

    def _message(self, field: str, message: object) -> dict[str, object]:
        if not isinstance(message, Mapping):
            raise wrong(field, message, 'an object such as {"role": "user", "content": "Hi"}')
        role = message.get("role")
        if role not in ROLES:
            raise wrong(f"{field}.role", role, "one of " + ", ".join(ROLES))
        if "content" not in message and role != "assistant":
            raise FieldError(f"{field} lacks content")
        turn = {"role": role, "content": parse_content(f"{field}.content", message.get("content"))}
        if message.get("name") is not None:
            turn["name"] = message["name"]
        if role == "assistant":
            self._add_answer(field, message, turn)
        if role == "tool" and message.get("tool_call_id") is not None:
            turn["tool_call_id"] = message["tool_call_id"]
        return turn

    def _add_answer(self, field: str, message: Mapping[str, object], turn: dict[str, object]) -> None:
        """Add what only the model writes."""
        if message.get("reasoning_content") is not None:
            turn["reasoning_content"] = message["reasoning_content"]
        if calls := parse_calls(f"{field}.tool_calls", message.get("tool_calls")):
            turn["tool_calls"] = calls


STREAM_OPTIONS_FLAGS = {"include_usage": Flag(), "continuous_usage_stats": Flag()}


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Returns the flags; fields that are not known are left out."""

    allowed: str = 'an object such as {"include_usage": true}'

    def parse(self, field: str, value: object) -> dict[str, bool]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, self.allowed)
        known = {name: rule for name, rule in STREAM_OPTIONS_FLAGS.items() if value.get(name) is not None}
        return {name: rule.parse(f"{field}.{name}", value[name]) for name, rule in known.items()}
