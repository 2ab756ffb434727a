"""The grammar of a call as Qwen3-Coder writes it: one block of plain text for each parameter.

A string is written without quotes, so the library's grammar of JSON does not fit it. Its length and its choices are
enforced here. Anything else is JSON. What the schema asks for beyond that is refused, not ignored.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from mgpu.orchestrator.gateway.text.grammar import GrammarError

BEGIN, END = "<tool_call>\n<function={name}>\n", "</function>\n</tool_call>"
_VALUE_END = "\n</parameter>\n"
_NAME = re.compile(r"[^<>\s]{1,256}")
_SHARED = ("$defs", "definitions")
_REMARKS = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema")
_OF_OBJECT = {"type", "properties", "required", "additionalProperties", *_SHARED, *_REMARKS}
_OF_STRING = {"type", "enum", "const", "minLength", "maxLength", *_REMARKS}


def call_rules(rule: str, function: Mapping[str, Any], json_options: Mapping[str, Any]) -> list[str]:
    """Return the rule for a call of ``function``, and those that it needs. GrammarError if it cannot be enforced."""
    name, schema = function["name"], function.get("parameters", {})
    _check_keys(f"the parameters of {name}", schema, _OF_OBJECT)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise GrammarError(f"the parameters of {name} are no JSON schema: properties is a map, and required a list")
    if missing := [each for each in required if not isinstance(each, str) or each not in properties]:
        raise GrammarError(f"the parameters of {name} require {str(missing[0])[:60]!a}, which properties does not have")
    shared = {key: schema[key] for key in _SHARED if key in schema}
    parts, rules = [_quoted(BEGIN.format(name=name))], []
    for at, (key, value) in enumerate(properties.items()):
        if not _NAME.fullmatch(key):
            raise GrammarError(f"the parameter {key[:60]!a} of {name} has a name that this format cannot write")
        head, terminal = _quoted(f"<parameter={key}>\n"), f"{rule.upper()}_P{at}"
        whole = f"{head} {terminal.lower()}"
        parts.append(whole if key in required else f"({whole})?")
        rules.append(_value_rule(terminal, f"the parameter {key[:60]!a} of {name}", value, shared, json_options))
    return [f"{rule}: {' '.join([*parts, _quoted(END)])}", *rules]


def _value_rule(terminal: str, what: str, value: object, shared: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return the rule for a value and the marker of its end."""
    rule = terminal.lower()
    if not isinstance(value, Mapping) or value.get("type") != "string":
        schema = {**shared, **value, "x-guidance": options} if isinstance(value, Mapping) else value
        return f"{rule}: %json {_plain(json.dumps(schema))} {_quoted(_VALUE_END)}"
    _check_keys(what, value, _OF_STRING)
    least, most = value.get("minLength", 0), value.get("maxLength", "")
    if not all(each == "" or (type(each) is int and each >= 0) for each in (least, most)):
        raise GrammarError(f"{what}: minLength and maxLength must be integers of at least 0")
    if "enum" in value or "const" in value:
        texts = [value["const"]] if "const" in value else value["enum"]
        return f"{rule}: " + " | ".join(_quoted(text + _VALUE_END) for text in _checked_choices(what, texts, value))
    text = f"/(?s:.{{{least},{most}}})/ & ~/(?s:.*)\\x3c\\/parameter>(?s:.*)/"
    return f"{rule}: {terminal}\n{terminal}: ({text}) {_quoted(_VALUE_END)}"


def _checked_choices(what: str, texts: object, value: Mapping[str, Any]) -> list[str]:
    """Return the texts that a string may be. GrammarError if this format cannot write one of them, or none is left."""
    least, most = value.get("minLength", 0), value.get("maxLength", float("inf"))
    allowed = value.get("enum", texts)
    found = [each for each in texts if isinstance(each, str)] if isinstance(texts, list) else []
    found = [each for each in found if least <= len(each) <= most and isinstance(allowed, list) and each in allowed]
    if not found or any("</parameter>" in each for each in found):
        raise GrammarError(f"{what} has no choice that this format can write")
    return found


def _check_keys(what: str, schema: object, known: set[str]) -> None:
    if not isinstance(schema, Mapping):
        raise GrammarError(f"{what} are no JSON schema: a schema is a map")
    if unknown := [key for key in schema if key not in known]:
        raise GrammarError(
            f"{what}: {unknown[0][:60]} cannot be enforced in calls of this format; leave it out, or use auto"
        )


def _quoted(text: str) -> str:
    return _plain(json.dumps(text, ensure_ascii=False))


def _plain(text: str) -> str:
    """Return JSON without the sign that could begin the name of a special token in a grammar."""
    return text.replace("<", "\\u003c")
