"""The rule of ``structured_outputs``: what the text of an answer must be, in one of five forms."""

from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.protocol.front.fields import Array, FieldError, Rule, Text, wrong

MAX_BYTES = 128 << 10
"""Bound of a schema, expression or grammar as UTF-8, and of all choices together."""


@dataclass(frozen=True, slots=True)
class OnlyTrue:
    allowed: str = "true"

    def parse(self, field: str, value: object) -> bool:
        if value is not True:
            raise wrong(field, value, self.allowed)
        return value


KINDS: dict[str, Rule] = {
    "json_schema": Text(MAX_BYTES, 1),
    "json_object": OnlyTrue(),
    "regex": Text(MAX_BYTES, 1),
    "choice": Array(Text(MAX_BYTES, 1), 1024, 1),
    "grammar": Text(MAX_BYTES, 1),
}
"""The fields, of which exactly one is given. ``json_schema`` is the schema as a JSON text."""


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """A map with exactly one of `KINDS`. `parse` returns it."""

    @property
    def allowed(self) -> str:
        fields = "; ".join(f"{name}: {rule.allowed}" for name, rule in KINDS.items())
        return f"a map of exactly one of {fields}"

    def parse(self, field: str, value: object) -> dict[str, object]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, f"a map of one of {', '.join(KINDS)}")
        given = [name for name in value if value[name] is not None]
        if len(given) != 1 or given[0] not in KINDS:
            shown = ascii(", ".join(map(str, given[:8])))[:60] if given else "none"
            raise FieldError(f"{field} must have exactly one of {', '.join(KINDS)}, got {shown}")
        [name] = given
        parsed = KINDS[name].parse(f"{field}.{name}", value[name])
        texts = parsed if isinstance(parsed, tuple) else (parsed,)
        size = sum(len(text.encode()) for text in texts if isinstance(text, str))
        if size > MAX_BYTES:
            raise FieldError(f"{field}.{name} has {size} bytes, the limit is {MAX_BYTES}")
        return {name: parsed}
