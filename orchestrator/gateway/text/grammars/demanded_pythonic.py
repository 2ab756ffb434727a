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
    sequence_rules,
    without_brackets,
)
from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError
from mgpu.protocol.chat.json_scanner import BrokenJson
from mgpu.protocol.chat.pythonic import parse_call


def call_rules(rule: str, function: Mapping[str, Any], json_options: Mapping[str, Any]) -> list[str]:
    """Return the rule for a call of ``function``, and those that it needs. GrammarError if it cannot be enforced."""
    parameters = list(parameters_of(function, json_options))
    for each in parameters:
        if not _can_be_keyword(each.name):
            raise GrammarError(f"{each.what} has a name that this format cannot write")
    parts = [(f"{quoted(each.name + '=')} {_value(each)}", each.is_required) for each in parameters]
    return sequence_rules(rule, function["name"] + "(", parts, ", ", ")")


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
