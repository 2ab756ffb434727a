"""What grammars of demanded calls share: texts in them, and parameters of formats that write each by itself."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError

_SHARED = ("$defs", "definitions")
REMARKS = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema")
_OF_OBJECT = {"type", "properties", "required", "additionalProperties", *_SHARED, *REMARKS}


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    schema: object
    """A map, true or false."""
    whole: object
    """The same with what it may refer to, and with options for the library."""
    is_required: bool
    what: str
    """How an error names it."""


def parameters_of(function: Mapping[str, Any], json_options: Mapping[str, Any]) -> Iterator[Parameter]:
    """Yield the parameters of a function in the order of its schema. GrammarError for what cannot be enforced."""
    name, schema = function["name"], function.get("parameters", {})
    check_keys(f"the parameters of {name}", schema, _OF_OBJECT)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise GrammarError(f"the parameters of {name} are no JSON schema: properties is a map, and required a list")
    if missing := [each for each in required if not isinstance(each, str) or each not in properties]:
        raise GrammarError(f"the parameters of {name} require {str(missing[0])[:60]!a}, which properties does not have")
    shared = {key: schema[key] for key in _SHARED if key in schema}
    for key, value in properties.items():
        whole = {**shared, **value, "x-guidance": json_options} if isinstance(value, Mapping) else value
        yield Parameter(key, value, whole, key in required, f"the parameter {key[:60]!a} of {name}")


def check_keys(what: str, schema: object, known: set[str]) -> None:
    """Raise GrammarError for a keyword that would be ignored."""
    if not isinstance(schema, Mapping):
        raise GrammarError(f"{what} are no JSON schema: a schema is a map")
    if unknown := [key for key in schema if key not in known]:
        raise GrammarError(
            f"{what}: {unknown[0][:60]} cannot be enforced in calls of this format; leave it out, or use auto"
        )


def quoted(text: str) -> str:
    """Return a text as a grammar has it."""
    return without_brackets(json.dumps(text, ensure_ascii=False))


def without_brackets(text: str) -> str:
    """Return JSON without the sign that could begin the name of a special token in a grammar."""
    return text.replace("<", "\\u003c")
