"""Tools and reasoning in OpenAI's chats: what a model writes comes back apart, whole and as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from harness.answers.tool_templates import BROKEN, CALL, QWEN, THOUGHT, TIME_CALL, weather_tool
from harness.servers.gateway_process import GatewayProcess, make_model_folder, says, text_of
from harness.servers.http_process import HttpServer

if TYPE_CHECKING:
    import openai

CHAT = "/v1/chat/completions"
TOOLS = [weather_tool(), weather_tool("get_time")]
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("model"), QWEN)) as gateway:
        yield gateway


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, **options)  # type: ignore[call-overload]


def test_calls_and_reasoning_come_apart(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(THOUGHT + "I look.\n" + CALL + TIME_CALL)
    [choice] = ask(openai_client).choices
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning_content) == ("I look.", "It may rain.")
    calls = [(call.type, call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("function", "get_weather", {"city": "Zürich"}), ("function", "get_time", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert '"description": "Größe <b>"' in text_of(gateway.engine.submits[-1])


def test_a_stream_brings_the_same_in_parts(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(THOUGHT + "I look.\n" + CALL + TIME_CALL)
    content, reasoning, calls, reasons = "", "", {}, []
    for chunk in ask(openai_client, stream=True):
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", "") or ""
        for part in choice.delta.tool_calls or []:
            calls.setdefault(part.index, []).append(part)
        reasons += [choice.finish_reason] * bool(choice.finish_reason)
    assert (content, reasoning, reasons) == ("I look.", "It may rain.", ["tool_calls"])
    assert [parts[0].function.name for parts in calls.values()] == ["get_weather", "get_time"]
    assert all(parts[0].id and not any(part.id for part in parts[1:]) for parts in calls.values())
    arguments = ["".join(part.function.arguments for part in parts) for parts in calls.values()]
    assert arguments == ['{"city": "Zürich"}', "{}"]
    assert len(calls[0]) > 10  # as it comes, not at the end


def test_the_stream_helper_of_the_official_client_sums_it_up(
    openai_client: openai.OpenAI, gateway: GatewayProcess
) -> None:
    gateway.engine.script = says(CALL)
    with openai_client.chat.completions.stream(model="tiny", messages=HELLO, tools=TOOLS) as stream:  # type: ignore[arg-type]
        message = stream.get_final_completion().choices[0].message
    [call] = message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Zürich"}')


@pytest.mark.parametrize("text", [BROKEN, CALL[:-30], '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_does_not_parse_is_text(
    openai_client: openai.OpenAI, gateway: GatewayProcess, text: str, stream: bool
) -> None:
    gateway.engine.script = says(text)
    answer = ask(openai_client, stream=stream)
    if not stream:
        [choice] = answer.choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
        return
    chunks = [chunk.choices[0] for chunk in answer]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == text
    assert chunks[-1].finish_reason == "stop"


def test_bytes_that_are_no_text_end_in_text(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(b'<think>\xff\xfe<tool_call>{"name"')
    [choice] = ask(openai_client).choices
    assert choice.message.content == ""
    assert choice.message.reasoning_content == '\ufffd\ufffd<tool_call>{"name"'


def test_choices_none_and_one_call(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(CALL + TIME_CALL)
    [choice] = ask(openai_client, tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls) == (CALL + TIME_CALL, None)
    assert "get_weather" not in text_of(gateway.engine.submits[-1])
    [choice] = ask(openai_client, parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]


def test_a_whole_conversation_reaches_the_template(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(CALL)
    message = ask(openai_client).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}
    gateway.engine.script = says("It is sunny.")
    answer = openai_client.chat.completions.create(model="tiny", messages=[*HELLO, message, result], tools=TOOLS)  # type: ignore[list-item,arg-type]
    assert answer.choices[0].message.content == "It is sunny."
    prompt = text_of(gateway.engine.submits[-1])
    assert '{"name": "get_weather", "arguments": {"city": "Zürich"}}' in prompt
    assert "<tool_response>\nSunny.\n</tool_response>" in prompt


def test_thinking_is_switched_by_the_template(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("A")
    ask(openai_client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert text_of(gateway.engine.submits[-1]).endswith("<think>\n\n</think>\n\n")
    ask(openai_client, reasoning_effort="none")
    assert text_of(gateway.engine.submits[-1]).endswith("<think>\n\n</think>\n\n")
    ask(openai_client, reasoning_effort="high")
    assert text_of(gateway.engine.submits[-1]).endswith("assistant\n")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [weather_tool(f"f{at}") for at in range(1000)]}, "tools", "1000 functions, the limit is 128"),
        ({"tools": [weather_tool()] * 2}, "tools", "as that of tools[0]"),
        ({"tools": [weather_tool("a b")]}, "tools", "1 to 64 letters"),
        ({"tools": [{"type": "web_search"}]}, "tools", "functions only"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "must be auto, none, required, or"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not among"),
        ({"tool_choice": "required"}, "tool_choice", "offers no tools"),
        ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages", "no message before it"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages", "must be a string with a JSON object",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_way_out(http: HttpServer, fields: Any, param: str | None, words: str) -> None:
    answer = http.post(CHAT, {"messages": HELLO, **fields})
    assert answer.status == 400
    error = answer.json["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_tool_of_a_hundred_parameters_is_taken(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.set_info(max_seq_len=4000)
    properties = {f"p{at}": {"type": "string"} for at in range(100)}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    body = {"messages": [{"role": "user", "content": "hello"}], "tools": [tool], "max_tokens": 4}
    answer = http.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.body
