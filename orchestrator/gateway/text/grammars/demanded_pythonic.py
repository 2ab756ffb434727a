"""The grammar of a call as Llama 3.2 and 4 write it: `f(a=1, b="x")`.

A value is JSON, which the parser reads as Python: the library's grammar of JSON writes no escape that Python reads
otherwise. A boolean that is a parameter of its own is written as Python has it, as these models do by themselves.
"""

import json
from collections.abc import Mapping
from typing import Any

from mgpu.orchestrator.gateway.text.grammars.demanded_parts import (
    REMARKS,
    Parameter,
    parameters_of,
    quoted,
    without_brackets,
)
from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError
from mgpu.protocol.chat.json_scanner import BrokenJson
from mgpu.protocol.chat.pythonic import parse_call


def call_rules(rule: str, function: Mapping[str, Any], json_options: Mapping[str, Any]) -> list[str]:
    """Return the rule for a call of ``function``, and those that it needs. GrammarError if it cannot be enforced.

    Parameters come in the order of the schema, and those that are not required may be left out. For a call with the
    parameters 0 and 1, of which 0 may be left out, after a first parameter has come (`more`), and before (`first`):

        call: "f(" first_0 ")"
        first_0: value_0 more_1 | first_1        more_1: ", " value_1 more_2
        first_1: value_1 more_2                  more_2:
    """
    parameters = list(parameters_of(function, json_options))
    rules = [f"{rule}: {quoted(function['name'] + '(')} {rule}_first_0 {quoted(')')}"]
    for at, each in enumerate(parameters):
        if not _can_be_keyword(each.name):
            raise GrammarError(f"{each.what} has a name that this format cannot write")
        value, more = f"{rule}_value_{at}", f"{rule}_more_{at + 1}"
        skips = ("", "") if each.is_required else (f" | {rule}_first_{at + 1}", f" | {more}")
        rules += [
            f"{value}: {quoted(each.name + '=')} {_value(each)}",
            f"{rule}_first_{at}: {value} {more}{skips[0]}",
            f'{rule}_more_{at}: ", " {value} {more}{skips[1]}',
        ]
    end = len(parameters)
    return [*rules, f'{rule}_first_{end}: ""', f'{rule}_more_{end}: ""']


def _value(parameter: Parameter) -> str:
    schema = parameter.schema
    if isinstance(schema, Mapping) and {key: schema[key] for key in schema if key not in REMARKS} == {
        "type": "boolean"
    }:
        return '("True" | "False")'
    return f"%json {without_brackets(json.dumps(parameter.whole))}"


def _can_be_keyword(name: str) -> bool:
    """Return whether the parser finds a parameter of this name again."""
    try:
        found: object = json.loads(parse_call(f"f({name}=1)")[1])
        return found == {name: 1}
    except BrokenJson:
        return False
