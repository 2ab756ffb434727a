"""An answer that must call a tool: each text of its grammar is a call that the parser of the format finds."""

import json
import random
from typing import Any

import jsonschema
import pytest

from harness.answers.grammar_follower import GrammarFollower
from harness.answers.tool_templates import weather_tool
from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.generic_tools import with_generic_tools
from mgpu.orchestrator.gateway.text.grammars.demanded_calls import call_grammar
from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError, checked_grammar
from mgpu.protocol.chat.answer_parser import AnswerParser, ParsedAnswer
from mgpu.protocol.chat.formats import ChatFormat
from mgpu.protocol.chat.tools import OfferedTools
from mgpu.protocol.internal.grammars import token_table
from mgpu.protocol.internal.worker_messages import Vocabulary

llguidance = pytest.importorskip("llguidance", reason="needs mgpu[serve]")
TOOLS = [weather_tool(), weather_tool("get-time")]
CALLS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "<A>"}}\n</tool_call>',
    "llama": '{"name": "get_weather", "parameters": {"city": "<A>"}}',
    "qwen3-coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n<A>\n</parameter>\n</function>\n</tool_call>"
    ),
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value><A></arg_value>\n</tool_call>",
    "minimax": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city"><A></parameter>\n</invoke>\n'
        "</minimax:tool_call>"
    ),
    "deepseek-v3.2": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true"><A></｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>"
    ),
    "pythonic": '[get_weather(city="<A>")]',
    "deepseek-v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "<A>"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
    "deepseek-v3.1": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "<A>"}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>"
    ),
    "kimi-k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "<A>"}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    "gemma4": '<|tool_call>call:get_weather{city:<|"|><A><|"|>}<tool_call|>',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "<A>"}}]',
}


def fits(grammar: str, text: str) -> bool:
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, checked_grammar({"grammar": grammar}))
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())


@pytest.mark.parametrize("name", CALLS)
def test_a_demanded_call_is_one_that_the_parser_finds(name: str) -> None:
    text = CALLS[name]
    for choice in ("required", {"name": "get_weather"}):
        for is_parallel in (True, False):
            assert fits(call_grammar(TOOLS, choice, name, is_parallel), text)
    assert fits(call_grammar(TOOLS, "required", name, True, "</think>"), "Hm <b> </think>\n\n" + text)
    for wrong in ("Hello", text[:-3], text.replace("get_weather", "rm"), text.replace("city", "town")):
        assert not fits(call_grammar(TOOLS, "required", name, True), wrong)
    assert not fits(call_grammar(TOOLS, {"name": "get-time"}, name, True), text)
    parser, answer = AnswerParser(ChatFormat(name), OfferedTools(TOOLS)), ParsedAnswer()
    answer.add([*parser.push(text), *parser.finish()])
    assert [(call.name, call.arguments) for call in answer.calls()] == [("get_weather", '{"city": "<A>"}')]


def test_a_named_tool_is_called_once_and_any_tool_several_times() -> None:
    two = "\n".join([CALLS["hermes"]] * 2)
    assert fits(call_grammar(TOOLS, "required", "hermes", True), two)
    for choice, is_parallel in (({"name": "get_weather"}, True), ("required", False)):
        assert not fits(call_grammar(TOOLS, choice, "hermes", is_parallel), two)


@pytest.mark.parametrize("most", [None, 0, 2])
def test_gpt_oss_calls_once_after_reasoning_of_a_bounded_length(most: int | None) -> None:
    names = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>"]
    channel, message, end, start, constrain, last = range(256, 256 + len(names))
    tokens = [*(bytes([number]) for number in range(256)), *(name.encode() for name in names)]
    vocabulary = Vocabulary(0, tokens, list(range(256, len(tokens))))
    grammar = call_grammar(TOOLS, {"name": "get_weather"}, "harmony", True, "", most)
    text = checked_grammar({"grammar": grammar}, lambda: token_table(vocabulary))
    head, arguments = b"commentary to=functions.get_weather ", b'{"city": "<A>"}'
    call = [channel, *head, constrain, *b"json", message, *arguments]
    GrammarFollower(text, vocabulary, [last]).take([*call, last])
    answer = GrammarFollower(text, vocabulary, [last])
    thought = b"Hm"[:most]
    answer.take([channel, *b"analysis", message, *thought])
    assert (answer.allowed() == {end}) == (most is not None)
    answer.take([end, start, *b"assistant", *call])
    assert answer.allowed() == {last}
    parser, found = AnswerParser(ChatFormat("harmony", "harmony"), OfferedTools(TOOLS)), ParsedAnswer()
    found.add([*parser.push(b"".join(tokens[each] for each in call).decode()), *parser.finish()])
    assert [(each.name, each.arguments) for each in found.calls()] == [("get_weather", '{"city": "<A>"}')]


def pythonic_tool(properties: dict[str, Any], required: list[str], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, **more}
    return {"type": "function", "function": {"name": "f-1", "parameters": parameters}}


def found_in(text: str, tools: list[dict[str, Any]], cut: int, chat_format: ChatFormat) -> list[tuple[str, Any]]:
    """Return the calls that the parser finds in a text that comes in two pieces. There must be no other text."""
    parser, answer = AnswerParser(chat_format, OfferedTools(tools)), ParsedAnswer()
    answer.add([*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.finish()])
    assert not answer.content
    return [(call.name, json.loads(call.arguments)) for call in answer.calls()]


def test_pythonic_parameters_come_in_order_and_only_those_that_are_required_must() -> None:
    tools = [pythonic_tool({"a": {"type": "string"}, "b": {"type": "boolean"}, "c": {"type": "null"}}, ["b"])]
    grammar = call_grammar(tools, "required", "pythonic", True)
    for text in ('[f-1(a="x", b=True, c=null)]', "[f-1(b=False)]", "[f-1(b=True, c=null), f-1(b=True)]"):
        assert fits(grammar, text), text
    for text in ("[f-1()]", "[f-1(, b=True)]", "[f-1(c=null, b=True)]", '[f-1(a="x")]', "[f-1(b=True,)]", "[]"):
        assert not fits(grammar, text), text
    for empty in ({}, {"type": "object", "properties": {}}):
        tool = {"type": "function", "function": {"name": "g", "parameters": empty}}
        assert fits(call_grammar([tool], "required", "pythonic", True), "[g()]")


@pytest.mark.parametrize("name", ["class", "None", "a-b", "a b", "*", "\ufb01", "a=1, b", "1", ""])
def test_a_parameter_that_python_cannot_name_is_refused(name: str) -> None:
    with pytest.raises(GrammarError, match="has a name that this format cannot write"):
        call_grammar([pythonic_tool({name: {}}, [])], "required", "pythonic", True)


TEXTS = ["'", '"', "\\", "a\n", "é", "<x>", "]", "f(a=1)", "\u2028", "", "None"]


def random_schema(rng: random.Random, depth: int = 2) -> Any:
    inner = [] if depth == 0 else ["array", "object", "any"]
    kind = rng.choice(["text", "choice", "const", "whole", "number", "truth", "null", "defined", *inner])
    if kind == "text":
        return {"type": "string", "maxLength": rng.randrange(5), "description": rng.choice(TEXTS)}
    if kind == "choice":
        return {"enum": rng.sample([*TEXTS, True, None, -1, 2.5, [1, "'"], {"a b": "'"}], 3)}
    if kind == "const":
        return {"const": rng.choice([*TEXTS, False, None, [], {}])}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": 2}
    if kind == "object":
        names = rng.sample(TEXTS, 2)
        properties = {name: random_schema(rng, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": names[:1], "additionalProperties": False}
    if kind == "any":
        return {"anyOf": [random_schema(rng, depth - 1), random_schema(rng, depth - 1)]}
    plain = {
        "whole": {"type": "integer", "minimum": -20, "maximum": 300},
        "number": {"type": "number", "minimum": -1, "maximum": 1},
        "truth": {"type": rng.choice(["boolean", ["boolean", "null"]])},
        "null": {"type": "null"},
        "defined": {"$ref": "#/$defs/d"},
    }
    return plain[kind]


@pytest.mark.parametrize(("name", "mark"), [("pythonic", "]"), ("gemma4", "}")])
def test_whatever_a_grammar_lets_a_model_write_is_a_call_that_fits_the_schema(name: str, mark: str) -> None:
    vocabulary = Vocabulary(0, [bytes([each]) for each in range(256)] + [b"</s>"], [256])
    rng, table = random.Random(7), token_table(vocabulary)
    for _ in range(25):
        names = rng.sample(["a", "b1", "_c", "été"], rng.randrange(4))
        shared = {"$defs": {"d": {"type": "string", "enum": ["'d'", "e"]}}}
        tools = [pythonic_tool({each: random_schema(rng) for each in names}, names[::2], **shared)]
        grammar = checked_grammar({"grammar": call_grammar(tools, "required", name, True)})
        answer, written = GrammarFollower(grammar, vocabulary, [256], table), bytearray()
        while (allowed := answer.allowed()) != {256} and not (256 in allowed and len(written) > 200):
            assert len(written) < 600
            is_long = 256 not in allowed and len(written) > 200
            token = ord(mark) if is_long and ord(mark) in allowed else 0
            token = token or rng.choice(sorted(allowed - {256}))
            answer.take([token])
            written.append(token)
        text = written.decode()
        calls = found_in(text, tools, len(text), ChatFormat(name))
        assert calls
        for called, arguments in calls:
            assert called == "f-1"
            jsonschema.validate(arguments, tools[0]["function"]["parameters"])
        assert all(found_in(text, tools, cut, ChatFormat(name)) == calls for cut in range(0, len(text), 7)), text


def coder_calls(properties: dict[str, Any], *values: tuple[str, str], **schema: Any) -> tuple[bool, str]:
    """Return whether a call with these values fits, and the arguments that the parser finds in it."""
    parameters = {"type": "object", "properties": properties, **schema}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    blocks = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values)
    text = f"<tool_call>\n<function=f>\n{blocks}</function>\n</tool_call>"
    parser, answer = AnswerParser(ChatFormat("qwen3-coder"), OfferedTools(tools)), ParsedAnswer()
    answer.add([*parser.push(text), *parser.finish()])
    found = "".join(call.arguments for call in answer.calls())
    return fits(call_grammar(tools, "required", "qwen3-coder", True), text), found


@pytest.mark.parametrize(
    ("schema", "value", "found"),
    [
        ({"type": "string"}, 'a "b"\n</para <x> é', 'a "b"\n</para <x> é'),
        ({"type": "string"}, "", ""),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "abc", "abc"),
        ({"type": "string", "enum": ["<a>", "b\n"], "description": "x"}, "b\n", "b\n"),
        ({"type": "string", "const": "c"}, "c", "c"),
        ({"type": "integer", "minimum": 5}, "7", 7),
        ({"type": ["string", "null"]}, '"a"', "a"),
        ({"type": "object", "properties": {"<b>": {}}, "additionalProperties": False}, '{"<b>": [1]}', {"<b>": [1]}),
        ({"$ref": "#/$defs/n"}, "true", True),
        (True, "null", None),
    ],
)
def test_a_plain_value_fits_its_schema(schema: Any, value: str, found: object) -> None:
    fit, arguments = coder_calls({"v": schema}, ("v", value), required=["v"], **{"$defs": {"n": {"type": "boolean"}}})
    assert fit
    assert json.loads(arguments) == {"v": found}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "a</parameter>b"),
        ({"type": "string", "minLength": 2}, "a"),
        ({"type": "string", "maxLength": 3}, "abcd"),
        ({"type": "string", "enum": ["a", "b"], "maxLength": 1}, "c"),
        ({"type": "integer", "minimum": 5}, "4"),
        ({"type": ["string", "null"]}, "a"),
    ],
)
def test_a_plain_value_that_does_not_fit_is_not_allowed(schema: Any, value: str) -> None:
    assert not coder_calls({"v": schema}, ("v", value))[0]


def test_only_parameters_that_are_required_must_come() -> None:
    properties = {"a": {"type": "string"}, "b": {"type": "integer"}}
    assert coder_calls(properties, ("b", "1"), required=["b"]) == (True, '{"b": 1}')
    assert not coder_calls(properties, ("a", "1"), required=["b"])[0]
    assert coder_calls({}) == (True, "{}")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"anyOf": []}, "anyOf cannot be enforced"),
        ({"properties": {"p": {"type": "string", "pattern": "a"}}}, "'p' of f: pattern cannot be enforced"),
        ({"properties": {"p": {"type": "string", "maxLength": "x"}}}, "must be integers"),
        ({"properties": {"p": {"type": "string", "enum": [1]}}}, "no choice"),
        ({"properties": {"p": {"type": "string", "enum": 1, "const": "a"}}}, "no choice"),
        ({"properties": {"p": {"type": "string", "maxLength": None}}}, "must be integers"),
        ({"properties": {}, "required": [["q"]]}, "which properties does not have"),
        ({"properties": {"p": {"type": "string", "enum": ["</parameter>"]}}}, "no choice"),
        ({"properties": {"a b": {}}}, "has a name that this format cannot write"),
        ({"properties": {}, "required": ["q"]}, "require 'q', which properties does not have"),
        ({"properties": []}, "are no JSON schema"),
    ],
)
def test_parameters_that_plain_values_cannot_fit_are_refused(parameters: dict[str, Any], words: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(GrammarError, match=words):
        call_grammar(tools, "required", "qwen3-coder", True)


def test_a_template_without_tools_gets_them_as_text() -> None:
    call: dict[str, Any] = {
        "id": "a",
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "A"}},
    }
    messages: tuple[dict[str, object], ...] = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "Sunny"},
    )
    chat = ChatPrompt(messages, tuple(TOOLS))
    assert with_generic_tools(chat, "{% for t in tools %}") is chat
    plain = with_generic_tools(chat, "{{ messages }}")
    assert plain.tools is None
    system, user, assistant, result = (str(message["content"]) for message in plain.messages)
    assert system.startswith("Be brief.")
    assert '"name": "get-time"' in system
    assert user == "Hi"
    assert assistant == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "A"}}\n</tool_call>'
    assert result == "<tool_response>\nSunny\n</tool_response>"
