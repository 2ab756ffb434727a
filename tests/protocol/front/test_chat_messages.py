"""What may be in a chat: whole messages and tools, bounded, with the way out where it is refused."""

from typing import Any

import pytest

from harness.answers.tool_templates import conversation, weather_tool
from mgpu.protocol.front.chat_messages import CHAT, TEMPLATE_OPTIONS, TOOL_CHOICE, TOOLS
from mgpu.protocol.front.client_messages import parse_client_message
from mgpu.protocol.front.fields import FieldError

USER = {"role": "user", "content": "Hi"}


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def function(**changes: Any) -> dict[str, Any]:
    tool = weather_tool()
    tool["function"] |= changes
    return tool


def test_whole_messages_pass() -> None:
    assert CHAT.parse("messages", conversation()) == tuple(conversation())
    [message] = CHAT.parse("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}])
    assert message["content"] == ""
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_tools_pass_without_what_is_not_for_the_model() -> None:
    assert TOOLS.parse("tools", [function(strict=True)]) == (weather_tool(),)
    [tool] = TOOLS.parse("tools", [{"type": "function", "function": {"name": "f", "parameters": None}}])
    assert tool["function"] == {"name": "f", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([function(name=f"f{at}") for at in range(1000)], "tools has 1000 functions, the limit is 128"),
        ([function(), function()], r"tools\[1\].function.name is 'get_weather', as that of tools\[0\]"),
        ([function(name="get weather")], "must be 1 to 64 letters, digits, _ or -, got 'get weather'"),
        ([function(name="")], "1 to 64 letters"),
        ([function(name="x" * 65)], "1 to 64 letters"),
        ([function(name="f\n")], "1 to 64 letters"),
        ([function(name="ä")], "1 to 64 letters"),
        ([function(name=7)], "1 to 64 letters"),
        ([{"type": "function", "function": {}}], "lacks name"),
        ([{"type": "function"}], "lacks function"),
        ([{"type": "web_search"}], "calls functions only"),
        ([function(parameters=[])], "a map with a JSON schema"),
        ([function(parameters={"type": "string"})], '"object"'),
        ([function(parameters={"a": nested(40)})], "nested more than 32 deep"),
        ([function(parameters={"a": float("nan")})], "as in JSON"),
        ([function(parameters={"a": b"x"})], "as in JSON"),
        ([function(parameters={1: "x"})], "keys are strings"),
        ([function(description=1)], "description must be"),
        (["f"], "must be a map"),
        ({"name": "f"}, "must be an array"),
    ],
)  # fmt: skip
def test_odd_tools_are_refused_with_the_place(tools: Any, words: str) -> None:
    with pytest.raises(FieldError, match=words) as caught:
        TOOLS.parse("tools", tools)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "tool", "tool_call_id": "x", "content": "1"}], r"messages\[0\].tool_call_id is 'x', but no message"),
        ([{**conversation()[2]}, {"role": "tool", "tool_call_id": "other", "content": "1"}], "'other'"),
        ([{**USER, "tool_calls": [{"function": {"name": "f"}}]}], "only an assistant has tool_calls"),
        ([{**USER, "tool_call_id": "x"}], "only a tool has it"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f g"}}]}], "function.name must be"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], "arguments must be"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 129}], "0 to 128 values"),
        ([{"role": "assistant", "tool_calls": [{}]}], "lacks function"),
        ([{"role": "assistant"}], "lacks content"),
        ([{**USER, "nmae": "ann"}], "did you mean name"),
    ],
)  # fmt: skip
def test_odd_messages_are_refused_with_the_place(messages: Any, words: str) -> None:
    with pytest.raises(FieldError, match=words):
        CHAT.parse("messages", messages)


@pytest.mark.parametrize("choice", ["sometimes", "", 1, {"name": "a b"}, {"function": {"name": "f"}}, ["auto"]])
def test_an_unknown_choice_is_refused(choice: Any) -> None:
    with pytest.raises(FieldError, match="tool_choice"):
        TOOL_CHOICE.parse("tool_choice", choice)


def test_a_choice_must_be_among_the_tools() -> None:
    base = {"type": "generate", "id": 1, "messages": [USER]}
    parse_client_message({**base, "tools": [function()], "tool_choice": {"name": "get_weather"}})
    with pytest.raises(FieldError, match="'f', which is not among the tools: get_weather"):
        parse_client_message({**base, "tools": [function()], "tool_choice": {"name": "f"}})
    with pytest.raises(FieldError, match="required, but the request offers no tools"):
        parse_client_message({**base, "tool_choice": "required"})
    with pytest.raises(FieldError, match="tools only apply to messages"):
        parse_client_message({"type": "generate", "id": 1, "prompt": "x", "tools": [function()]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"messages": []}, "must not have messages"),
        ({"add_generation_prompt": False}, "must not have add_generation_prompt"),
        ({"a b": 1}, "letters, digits and _"),
        ({f"a{at}": 1 for at in range(65)}, "up to 64 variables"),
        ({"a": nested(40)}, "nested more than 32 deep"),
        ({"enable_thinking": "yes"}, "enable_thinking must be true or false"),
    ],
)
def test_odd_template_options_are_refused(options: Any, words: str) -> None:
    with pytest.raises(FieldError, match=words):
        TEMPLATE_OPTIONS.parse("template_options", options)


def test_a_template_has_any_further_option() -> None:
    options = {"xml_tools": True, "custom": {"a": [1, None]}}
    assert TEMPLATE_OPTIONS.parse("template_options", options) == options
