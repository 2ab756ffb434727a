"""An answer that must call a tool: each text of its grammar is a call that the parser of the format finds."""

from typing import Any

import pytest

from harness.tool_templates import weather_tool
from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.demanded_calls import FORMATS, call_grammar
from mgpu.orchestrator.gateway.text.generic_tools import with_generic_tools
from mgpu.orchestrator.gateway.text.grammar import checked_grammar
from mgpu.protocol.chat.answer_parser import AnswerParser, ParsedAnswer
from mgpu.protocol.chat.formats import ChatFormat
from mgpu.protocol.chat.tools import OfferedTools

llguidance = pytest.importorskip("llguidance", reason="needs mgpu[serve]")
TOOLS = [weather_tool(), weather_tool("get-time")]
CALLS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "<A>"}}\n</tool_call>',
    "llama": '{"name": "get_weather", "parameters": {"city": "<A>"}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "<A>"}}]',
}


def fits(grammar: str, text: str) -> bool:
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, checked_grammar({"grammar": grammar}))
    ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())


@pytest.mark.parametrize("name", FORMATS)
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
