"""Rules for the fields of front channel messages: the allowed values, in words and in code."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

INT32_MAX = 2**31 - 1


class FieldError(ValueError):
    """A field of a message is wrong. The text names the field, its value and the allowed values."""


class Rule(Protocol):
    """The rule of one field."""

    @property
    def allowed(self) -> str:
        """The allowed values in words; docs/protocol.md shows the same text."""

    def parse(self, field: str, value: object) -> object:
        """Return the checked value. FieldError if it is not allowed."""


def shown(value: object) -> str:
    """Describe a value that may be hostile in at most 60 characters, without its nested content."""
    if isinstance(value, (list, tuple)):
        return f"an array of {len(value)}"
    if isinstance(value, Mapping):
        return f"a map of {len(value)}"
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    text = ascii(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def wrong(field: str, value: object, allowed: str) -> FieldError:
    return FieldError(f"{field} must be {allowed}, got {shown(value)}")


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number within bounds; the lower one may be excluded."""

    low: float
    high: float
    low_open: bool = False

    @property
    def allowed(self) -> str:
        start = f"above {self.low:g}, at most" if self.low_open else f"from {self.low:g} to"
        return f"a number {start} {self.high:g}"

    def parse(self, field: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise wrong(field, value, self.allowed)
        if not self.low <= value <= self.high or (self.low_open and value == self.low):  # true for NaN too
            raise wrong(field, value, self.allowed)
        return float(value)


@dataclass(frozen=True, slots=True)
class Integer:
    low: int
    high: int

    @property
    def allowed(self) -> str:
        return f"an integer from {self.low} to {_power(self.high)}"

    def parse(self, field: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise wrong(field, value, self.allowed)
        return value


def _power(bound: int) -> str:
    exponent = (bound + 1).bit_length() - 1
    return f"2^{exponent} - 1" if bound > 10**6 and bound + 1 == 1 << exponent else str(bound)


@dataclass(frozen=True, slots=True)
class Flag:
    allowed: str = "true or false"

    def parse(self, field: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise wrong(field, value, self.allowed)
        return value


@dataclass(frozen=True, slots=True)
class Text:
    """A string of Unicode scalar values; lone surrogates, which UTF-8 cannot carry, are refused."""

    max_chars: int
    min_chars: int = 0

    @property
    def allowed(self) -> str:
        return f"a string of {self.min_chars} to {self.max_chars} characters"

    def parse(self, field: str, value: object) -> str:
        if not isinstance(value, str) or not self.min_chars <= len(value) <= self.max_chars:
            raise wrong(field, value, self.allowed)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            at = error.start
            raise FieldError(f"{field} holds a lone surrogate (U+{ord(value[at]):04X}) at character {at}") from None
        return value


@dataclass(frozen=True, slots=True)
class OneOf:
    names: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(self.names)

    def parse(self, field: str, value: object) -> str:
        if not isinstance(value, str) or value not in self.names:
            raise wrong(field, value, self.allowed)
        return value


@dataclass(frozen=True, slots=True)
class Array:
    """An array of up to ``max_items`` values of one rule."""

    item: Rule
    max_items: int
    min_items: int = 0

    @property
    def allowed(self) -> str:
        return f"an array of {self.min_items} to {self.max_items} values, each {self.item.allowed}"

    def parse(self, field: str, value: object) -> tuple[object, ...]:
        if not isinstance(value, (list, tuple)) or not self.min_items <= len(value) <= self.max_items:
            raise wrong(field, value, self.allowed)
        return tuple(self.item.parse(f"{field}[{at}]", item) for at, item in enumerate(value))


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids as little-endian int32 in one ``bin``, or as an array. `parse` returns the bytes."""

    allowed: str = "token ids, at least one: a bin of little-endian int32, or an array of integers from 0 to 2^31 - 1"

    def parse(self, field: str, value: object) -> bytes:
        if isinstance(value, (list, tuple)):
            value = self._pack(field, value)
        if not isinstance(value, bytes) or not value or len(value) % 4:
            raise wrong(field, value, self.allowed)
        if not value[3::4].isascii():  # a sign bit is set; finding out which takes twenty times as long
            raise FieldError(f"{field} holds {min(int32_array(value))}; token ids are not negative")
        return value

    def _pack(self, field: str, ids: list[object] | tuple[object, ...]) -> bytes:
        for at, item in enumerate(ids):
            if type(item) is not int or not 0 <= item <= INT32_MAX:
                raise wrong(f"{field}[{at}]", item, Integer(0, INT32_MAX).allowed)
        return int32_bytes(ids)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Pairs:
    """An array of [token id, number] pairs, each id once."""

    value: Number
    max_items: int

    @property
    def allowed(self) -> str:
        return f"an array of 0 to {self.max_items} pairs [token id, {self.value.allowed}]"

    def parse(self, field: str, value: object) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, (list, tuple)) or len(value) > self.max_items:
            raise wrong(field, value, self.allowed)
        pairs: dict[int, float] = {}
        for at, pair in enumerate(value):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise wrong(f"{field}[{at}]", pair, "a pair [token id, number]")
            token_id = Integer(0, INT32_MAX).parse(f"{field}[{at}][0]", pair[0])
            if token_id in pairs:
                raise FieldError(f"{field} names token id {token_id} twice")
            pairs[token_id] = self.value.parse(f"{field}[{at}][1]", pair[1])
        return tuple(pairs.items())


@dataclass(frozen=True, slots=True)
class Record:
    """A map with named fields, all required unless ``optional``."""

    rules: Mapping[str, Rule]
    optional: bool = False

    @property
    def allowed(self) -> str:
        return "a map of " + "; ".join(f"{name}: {rule.allowed}" for name, rule in self.rules.items())

    def parse(self, field: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, "a map")
        parsed = parse_fields(value, self.rules, field + ".")
        missing = [] if self.optional else [name for name in self.rules if name not in parsed]
        if missing:
            raise FieldError(f"{field} lacks {', '.join(missing)}")
        return parsed


def parse_fields(data: Mapping[object, object], rules: Mapping[str, Rule], prefix: str = "") -> dict[str, object]:
    """Check all fields that are present; nil counts as absent. For an unknown field, FieldError names the closest."""
    parsed: dict[str, object] = {}
    for name, value in data.items():
        rule = rules.get(name) if isinstance(name, str) else None
        if rule is None:
            raise FieldError(_unknown(name, rules, prefix))
        if value is not None:
            parsed[str(name)] = rule.parse(prefix + str(name), value)
    return parsed


def _unknown(name: object, rules: Mapping[str, Rule], prefix: str) -> str:
    near = get_close_matches(name[:60], rules, n=1) if isinstance(name, str) else []
    hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(sorted(rules))}"
    return f"unknown field {prefix}{shown(name)}; {hint}"


def int32_array(data: bytes) -> "array[int]":
    """Unpack little-endian int32. ValueError when the length is not a multiple of four."""
    values = array("i")
    values.frombytes(data)
    return values


def int32_bytes(ids: "list[int] | tuple[int, ...]") -> bytes:
    """Pack token ids as little-endian int32."""
    return array("i", ids).tobytes()
