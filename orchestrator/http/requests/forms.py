"""The form of an answer in HTTP: OpenAI's ``response_format`` and ``text.format``, and vLLM's fields.

Each names a form of ``structured_outputs`` of the front channel, where schemas are JSON texts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgpu.orchestrator.http.edge.errors import bad_request
from mgpu.protocol.front.fields import FieldError, wrong
from mgpu.protocol.front.structured_outputs import KINDS, StructuredOutputs

Form = dict[str, object]
_VLLM_NAMES = {"json": "json_schema"}
_TYPES = ("text", "json_object", "json_schema")
GUIDED = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}
"""vLLM's older fields."""


@dataclass(frozen=True, slots=True)
class FormField:
    """``structured_outputs`` with our names or vLLM's, or one of vLLM's older fields. Returns the form."""

    kind: str = ""
    """The one that the field is for; empty: the value names it."""

    @property
    def allowed(self) -> str:
        if not self.kind:
            return f"an object with exactly one of {', '.join([*KINDS, *_VLLM_NAMES])}"
        return "a JSON Schema" if self.kind == "json" else KINDS[self.kind].allowed

    def parse(self, field: str, value: object) -> Form:
        if self.kind:
            value = {self.kind: value}
        if not isinstance(value, Mapping):
            raise wrong(field, value, self.allowed)
        named = {_VLLM_NAMES.get(name, name): each for name, each in value.items() if each is not None}
        if isinstance(schema := named.get("json_schema"), (Mapping, bool)):
            named["json_schema"] = _text(field, schema)
        return StructuredOutputs().parse(field, named)


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """OpenAI's ``response_format``; ``is_flat`` as in responses, where the schema stands beside the type.

    Returns the value as it came, since some answers have it again. `form_of` makes a form of it.
    """

    is_flat: bool = False

    @property
    def allowed(self) -> str:
        schema = '"schema": {…}' if self.is_flat else '"json_schema": {"name": "…", "schema": {…}}'
        return f'{{"type": "text"}}, {{"type": "json_object"}} or {{"type": "json_schema", {schema}}}'

    def parse(self, field: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping) or value.get("type") not in _TYPES:
            raise wrong(field, value.get("type") if isinstance(value, Mapping) else value, self.allowed)
        if value["type"] == "json_schema":
            holder, name = (value, field) if self.is_flat else (value.get("json_schema"), f"{field}.json_schema")
            schema = holder.get("schema") if isinstance(holder, Mapping) else None
            if not isinstance(schema, (Mapping, bool)):
                raise FieldError(f"{name} lacks a schema; {field} must be {self.allowed}")
            StructuredOutputs().parse(name, {"json_schema": _text(name, schema)})
        return value


@dataclass(frozen=True, slots=True)
class TextSettings:
    """``text`` of responses: the format of the answer. Returns the value as it came."""

    allowed: str = f'an object such as {{"format": …}} with one of {ResponseFormat(is_flat=True).allowed}'

    def parse(self, field: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise wrong(field, value, self.allowed)
        if value.get("format") is not None:
            ResponseFormat(is_flat=True).parse(f"{field}.format", value["format"])
        return value


def form_of(values: Mapping[str, Any]) -> Form | None:
    """Return the form that the checked fields of a body ask for. HttpError if they ask for several."""
    forms = {name: values[name] for name in ("structured_outputs", *GUIDED) if name in values}
    wanted = values.get("response_format"), (values.get("text") or {}).get("format")
    for name, each in zip(("response_format", "text"), wanted, strict=True):
        if each is not None and each["type"] == "json_object":
            forms[name] = {"json_object": True}
        elif each is not None and each["type"] == "json_schema":
            schema = each["schema"] if name == "text" else each["json_schema"]["schema"]
            forms[name] = {"json_schema": _text(name, schema)}
    if len(forms) > 1:
        raise bad_request(f"give one form of the answer, got {', '.join(forms)}", next(iter(forms)))
    return next(iter(forms.values()), None)


def _text(field: str, schema: object) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError):
        raise FieldError(f"{field} has a schema that is nested too deeply, or a number that JSON lacks") from None
