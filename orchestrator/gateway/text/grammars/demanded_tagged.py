"""The grammar of a call whose parameters stand between tags, as Qwen3-Coder, GLM, MiniMax and DeepSeek V3.2 write them.

A string is written without quotes, so the library's grammar of JSON does not fit it. Its length and its choices are
enforced here. Anything else is JSON. What the schema asks for beyond that is refused, not ignored.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgpu.orchestrator.gateway.text.grammars.demanded_parts import (
    REMARKS,
    Parameter,
    check_keys,
    parameters_of,
    quoted,
    without_brackets,
)
from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a format is written, line breaks included.

    `{name}` stands for that of a tool or a parameter, `{is_string}` for whether its value is a string.
    """

    begin: str
    end: str
    parameter: str
    value_end: str
    tag: str
    """The one that ends a value, which no string may have in it."""


_LAYOUTS = {
    "qwen3-coder": _Layout(
        "<tool_call>\n<function={name}>\n", "</function>\n</tool_call>", "<parameter={name}>\n", "\n</parameter>\n",
        "</parameter>",
    ),
    "glm": _Layout(
        "<tool_call>{name}\n", "</tool_call>", "<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n",
        "</arg_value>",
    ),
    "minimax": _Layout(
        '<minimax:tool_call>\n<invoke name="{name}">\n', "</invoke>\n</minimax:tool_call>",
        '<parameter name="{name}">', "</parameter>\n", "</parameter>",
    ),
    "deepseek-v3.2": _Layout(
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="{name}">\n', "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        '<｜DSML｜parameter name="{name}" string="{is_string}">', "</｜DSML｜parameter>\n", "</｜DSML｜parameter>",
    ),
}  # fmt: skip
TAGGED = tuple(_LAYOUTS)
_NAME = re.compile(r"[^<>\s\"]{1,256}")
_OF_STRING = {"type", "enum", "const", "minLength", "maxLength", *REMARKS}


def call_rules(rule: str, function: Mapping[str, Any], json_options: Mapping[str, Any], tool_format: str) -> list[str]:
    """Return the rule for a call of ``function``, and those that it needs. GrammarError if it cannot be enforced."""
    layout = _LAYOUTS[tool_format]
    parts, rules = [quoted(layout.begin.format(name=function["name"]))], []
    for at, each in enumerate(parameters_of(function, json_options)):
        if not _NAME.fullmatch(each.name):
            raise GrammarError(f"{each.what} has a name that this format cannot write")
        head = layout.parameter.format(name=each.name, is_string=json.dumps(_is_string(each)))
        terminal = f"{rule.upper()}_P{at}"
        whole = f"{quoted(head)} {terminal.lower()}"
        parts.append(whole if each.is_required else f"({whole})?")
        rules.append(_value_rule(terminal, each, layout))
    return [f"{rule}: {' '.join([*parts, quoted(layout.end)])}", *rules]


def _is_string(parameter: Parameter) -> bool:
    return isinstance(parameter.schema, Mapping) and parameter.schema.get("type") == "string"


def _value_rule(terminal: str, parameter: Parameter, layout: _Layout) -> str:
    """Return the rule for a value and the marker of its end."""
    rule, value, what = terminal.lower(), parameter.schema, parameter.what
    if not isinstance(value, Mapping) or not _is_string(parameter):
        return f"{rule}: %json {without_brackets(json.dumps(parameter.whole))} {quoted(layout.value_end)}"
    check_keys(what, value, _OF_STRING)
    least, most = value.get("minLength", 0), value.get("maxLength", "")
    if not all(each == "" or (type(each) is int and each >= 0) for each in (least, most)):
        raise GrammarError(f"{what}: minLength and maxLength must be integers of at least 0")
    if "enum" in value or "const" in value:
        texts = [value["const"]] if "const" in value else value["enum"]
        choices = _checked_choices(what, texts, value, layout.tag)
        return f"{rule}: " + " | ".join(quoted(text + layout.value_end) for text in choices)
    tag = layout.tag.replace("<", "\\x3c").replace("/", "\\/")
    text = f"/(?s:.{{{least},{most}}})/ & ~/(?s:.*){tag}(?s:.*)/"
    return f"{rule}: {terminal}\n{terminal}: ({text}) {quoted(layout.value_end)}"


def _checked_choices(what: str, texts: object, value: Mapping[str, Any], tag: str) -> list[str]:
    """Return the texts that a string may be. GrammarError if this format cannot write one of them, or none is left."""
    least, most = value.get("minLength", 0), value.get("maxLength", float("inf"))
    allowed = value.get("enum", texts)
    found = [each for each in texts if isinstance(each, str)] if isinstance(texts, list) else []
    found = [each for each in found if least <= len(each) <= most and isinstance(allowed, list) and each in allowed]
    if not found or any(tag in each for each in found):
        raise GrammarError(f"{what} has no choice that this format can write")
    return found
