"""The grammar of a call as Gemma 4 writes it: `call:f{city:<|"|>Bern<|"|>,days:3}` between two markers.

A string of which the schema says nothing or only its length stands between its own tokens, as the model writes it.
Any other value is JSON, which the parser takes too.
"""

import json
import re
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
from mgpu.protocol.chat.gemma import BEGIN, END, QUOTE

_NAME = re.compile(r"[^\s:,{}\[\]<\"]{1,256}")
_OF_PLAIN_STRING = {"type", "minLength", "maxLength", *REMARKS}


def call_rules(rule: str, function: Mapping[str, Any], json_options: Mapping[str, Any]) -> list[str]:
    """Return the rule for a call of ``function``, and those that it needs. GrammarError if it cannot be enforced."""
    parameters, rules, parts = list(parameters_of(function, json_options)), [], []
    for at, each in enumerate(parameters):
        if not _NAME.fullmatch(each.name):
            raise GrammarError(f"{each.what} has a name that this format cannot write")
        value, more = _value(f"{rule.upper()}_P{at}", each)
        rules += more
        parts.append((f"{quoted(each.name + ':')} {value}", each.is_required))
    begin, end = f"{BEGIN}call:{function['name']}{{", "}" + END
    return [*sequence_rules(rule, begin, parts, ",", end), *rules]


def _value(terminal: str, parameter: Parameter) -> tuple[str, list[str]]:
    """Return what stands for a value, and the rules that it needs."""
    schema = parameter.schema
    if isinstance(schema, Mapping) and schema.get("type") == "string" and not set(schema) - _OF_PLAIN_STRING:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if not all(each == "" or (type(each) is int and each >= 0) for each in (least, most)):
            raise GrammarError(f"{parameter.what}: minLength and maxLength must be integers of at least 0")
        quote = re.escape(QUOTE).replace("<", "\\x3c")
        text = f"/(?s:.{{{least},{most}}})/ & ~/(?s:.*){quote}(?s:.*)/"
        return f"{quoted(QUOTE)} {terminal}", [f"{terminal}: ({text}) {quoted(QUOTE)}"]
    return f"%json {without_brackets(json.dumps(parameter.whole))}", []
