"""What grammars of demanded calls share: texts in them, and parameters of formats that write each by itself."""

import json
from collections.abc import Iterator, Mapping, Sequence
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


def sequence_rules(rule: str, begin: str, parts: Sequence[tuple[str, bool]], between: str, end: str) -> list[str]:
    """Return rules for parameters in their order, of which those that are not required may be left out.

    ``parts``: what stands for each, and whether it is required. For the parameters 0 and 1, of which 0 may be left out,
    after a first parameter has come (`more`), and before (`first`):

        call: "f(" first_0 ")"
        first_0: value_0 more_1 | first_1        more_1: ", " value_1 more_2
        first_1: value_1 more_2                  more_2:
    """
    rules = [f"{rule}: {quoted(begin)} {rule}_first_0 {quoted(end)}"]
    for at, (part, is_required) in enumerate(parts):
        value, more = f"{rule}_value_{at}", f"{rule}_more_{at + 1}"
        skips = ("", "") if is_required else (f" | {rule}_first_{at + 1}", f" | {more}")
        rules += [
            f"{value}: {part}",
            f"{rule}_first_{at}: {value} {more}{skips[0]}",
            f"{rule}_more_{at}: {quoted(between)} {value} {more}{skips[1]}",
        ]
    last = len(parts)
    return [*rules, f'{rule}_first_{last}: ""', f'{rule}_more_{last}: ""']


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
