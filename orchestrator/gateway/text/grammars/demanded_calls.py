"""The grammar of an answer that must call a tool, for a `tool_choice` that demands it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mgpu.orchestrator.gateway.text.grammars import demanded_gemma as gemma
from mgpu.orchestrator.gateway.text.grammars import demanded_harmony as harmony
from mgpu.orchestrator.gateway.text.grammars import demanded_pythonic as pythonic
from mgpu.orchestrator.gateway.text.grammars import demanded_tagged as tagged
from mgpu.orchestrator.gateway.text.grammars.demanded_parts import quoted, without_brackets
from mgpu.protocol.chat.formats import HARMONY
from mgpu.protocol.chat.sections import FENCE, DeepSeek, Kimi

MOST_CALLS = 16
"""In an answer that must have one, so that a small model comes to an end."""
_V3, _K2 = DeepSeek, Kimi
_FORMS: dict[str, tuple[str, str, str, str, str, str]] = {
    # Before the first call, before a name, before arguments, after them, between two calls, after the last.
    "hermes": ("", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", ""),
    "llama": ("", '{"name": "', '", "parameters": ', "}", "; ", ""),
    "mistral": ("[TOOL_CALLS][", '{"name": "', '", "arguments": ', "}", ", ", "]"),
    "deepseek-v3": (
        _V3.section, f"{_V3.call}function{_V3.separator}", f"\n{FENCE}json\n", f"\n{FENCE}{_V3.call_end}", "\n",
        _V3.section_end,
    ),
    "deepseek-v3.1": (_V3.section, _V3.call, _V3.separator, _V3.call_end, "", _V3.section_end),
    "kimi-k2": (
        _K2.section, f"{_K2.call}functions.", f":0{_K2.separator}", _K2.call_end, "", _K2.section_end
    ),
}  # fmt: skip
PYTHONIC, GEMMA = "pythonic", "gemma4"
_AROUND = {**dict.fromkeys(tagged.TAGGED, ("", "\n", "")), PYTHONIC: ("[", ", ", "]"), GEMMA: ("", "", "")}
"""Before the first call, between two calls, after the last."""
FORMATS = (*_FORMS, *_AROUND, HARMONY)
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""At most one blank after a comma or colon: small models may never end white space."""


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: object,
    tool_format: str,
    is_parallel: bool,
    reasoning_end: str = "",
    most_thinking_tokens: int | None = None,
) -> str:
    """Return a grammar in Lark's syntax: calls of the tools, after the marker of the end of reasoning if there is one.

    ``choice`` is `required`, or a map with the name of the one tool, which is then called once. GrammarError for
    parameters that cannot be enforced; of most formats `checked_grammar` finds them. ``most_thinking_tokens`` is for
    gpt-oss, whose reasoning is a message of its own before the call.
    """
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, Mapping):
        functions = [each for each in functions if each["name"] == choice["name"]]
    rules = ["call: " + " | ".join(f"call_{at}" for at in range(len(functions)))]
    for at, function in enumerate(functions):
        rules += _call_rules(at, function, tool_format)
    if tool_format == HARMONY:
        return "\n".join([*harmony.first_rules(most_thinking_tokens), *rules])
    begin, between, last = _around(tool_format)
    may_repeat = is_parallel and not isinstance(choice, Mapping)
    more = f" ({quoted(between)} call){{0,{MOST_CALLS - 1}}}" if may_repeat else ""
    rules.insert(0, f"calls: {quoted(begin)} call{more} {quoted(last)}".replace(' ""', "").replace('"" ', ""))
    if not reasoning_end:
        return "\n".join(["start: calls", *rules])
    thought = f"thought[suffix={quoted(reasoning_end)}]: /(?s:.*)/"
    return "\n".join(["start: thought SPACE calls", thought, "SPACE: /\\s{0,2}/", *rules])


def _around(tool_format: str) -> tuple[str, str, str]:
    """Return what comes before the first call, between two calls, and after the last."""
    if tool_format in _AROUND:
        return _AROUND[tool_format]
    begin, _, _, _, between, last = _FORMS[tool_format]
    return begin, between, last


def _call_rules(at: int, function: Mapping[str, Any], tool_format: str) -> list[str]:
    if tool_format in tagged.TAGGED:
        return tagged.call_rules(f"call_{at}", function, _JSON_OPTIONS, tool_format)
    if tool_format == PYTHONIC:
        return pythonic.call_rules(f"call_{at}", function, _JSON_OPTIONS)
    if tool_format == GEMMA:
        return gemma.call_rules(f"call_{at}", function, _JSON_OPTIONS)
    if tool_format == HARMONY:
        return harmony.call_rules(at, function["name"], _schema(function))
    _, before_name, before_arguments, end, _, _ = _FORMS[tool_format]
    head = quoted(before_name + function["name"] + before_arguments)
    return [
        f"call_{at}: {head} arguments_{at} {quoted(end)}",
        f"arguments_{at}: %json {without_brackets(json.dumps(_schema(function)))}",
    ]


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of the arguments; an object without further properties unless it says otherwise."""
    schema = {"type": "object", **function.get("parameters", {})}
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return {**schema, "x-guidance": _JSON_OPTIONS}
