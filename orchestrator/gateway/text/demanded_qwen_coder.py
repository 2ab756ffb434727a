"""The grammar of a call as Qwen3-Coder writes it: one block of plain text for each parameter.

A string is written without quotes, so the library's grammar of JSON does not fit it. Its length and its choices are
enforced here. Anything else is JSON. What the schema asks for beyond that is refused, not ignored.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from mgpu.orchestrator.gateway.text.demanded_parts import (
    REMARKS,
    Parameter,
    check_keys,
    parameters_of,
    quoted,
    without_brackets,
)
from mgpu.orchestrator.gateway.text.grammar import GrammarError

BEGIN, END = "<tool_call>\n<function={name}>\n", "</function>\n</tool_call>"
_VALUE_END = "\n</parameter>\n"
_NAME = re.compile(r"[^<>\s]{1,256}")
_OF_STRING = {"type", "enum", "const", "minLength", "maxLength", *REMARKS}


def call_rules(rule: str, function: Mapping[str, Any], json_options: Mapping[str, Any]) -> list[str]:
    """Return the rule for a call of ``function``, and those that it needs. GrammarError if it cannot be enforced."""
    parts, rules = [quoted(BEGIN.format(name=function["name"]))], []
    for at, each in enumerate(parameters_of(function, json_options)):
        if not _NAME.fullmatch(each.name):
            raise GrammarError(f"{each.what} has a name that this format cannot write")
        head, terminal = quoted(f"<parameter={each.name}>\n"), f"{rule.upper()}_P{at}"
        whole = f"{head} {terminal.lower()}"
        parts.append(whole if each.is_required else f"({whole})?")
        rules.append(_value_rule(terminal, each))
    return [f"{rule}: {' '.join([*parts, quoted(END)])}", *rules]


def _value_rule(terminal: str, parameter: Parameter) -> str:
    """Return the rule for a value and the marker of its end."""
    rule, value, what = terminal.lower(), parameter.schema, parameter.what
    if not isinstance(value, Mapping) or value.get("type") != "string":
        return f"{rule}: %json {without_brackets(json.dumps(parameter.whole))} {quoted(_VALUE_END)}"
    check_keys(what, value, _OF_STRING)
    least, most = value.get("minLength", 0), value.get("maxLength", "")
    if not all(each == "" or (type(each) is int and each >= 0) for each in (least, most)):
        raise GrammarError(f"{what}: minLength and maxLength must be integers of at least 0")
    if "enum" in value or "const" in value:
        texts = [value["const"]] if "const" in value else value["enum"]
        return f"{rule}: " + " | ".join(quoted(text + _VALUE_END) for text in _checked_choices(what, texts, value))
    text = f"/(?s:.{{{least},{most}}})/ & ~/(?s:.*)\\x3c\\/parameter>(?s:.*)/"
    return f"{rule}: {terminal}\n{terminal}: ({text}) {quoted(_VALUE_END)}"


def _checked_choices(what: str, texts: object, value: Mapping[str, Any]) -> list[str]:
    """Return the texts that a string may be. GrammarError if this format cannot write one of them, or none is left."""
    least, most = value.get("minLength", 0), value.get("maxLength", float("inf"))
    allowed = value.get("enum", texts)
    found = [each for each in texts if isinstance(each, str)] if isinstance(texts, list) else []
    found = [each for each in found if least <= len(each) <= most and isinstance(allowed, list) and each in allowed]
    if not found or any("</parameter>" in each for each in found):
        raise GrammarError(f"{what} has no choice that this format can write")
    return found
