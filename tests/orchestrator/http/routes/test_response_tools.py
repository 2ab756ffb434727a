"""Tools and reasoning in OpenAI's responses: items of their own, whole and as events, and back as input."""

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

RESPONSES = "/v1/responses"
TOOLS = [{"type": "function", "strict": True, **weather_tool(name)["function"]} for name in ("get_weather", "get_time")]
ANSWER = THOUGHT + "I look.\n" + CALL + TIME_CALL


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("model"), QWEN)) as gateway:
        yield gateway


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"model": "tiny", "input": "Hi", "tools": TOOLS, **options})


def told(items: Any) -> list[tuple[str, str]]:
    """Return kind and text of each item."""
    found = []
    for item in items:
        text = item.arguments if item.type == "function_call" else item.content[0].text
        found.append((f"{item.type} {item.name}" if item.type == "function_call" else item.type, text))
    return found


EXPECTED = [
    ("reasoning", "It may rain."), ("message", "I look."),
    ("function_call get_weather", '{"city": "Zürich"}'), ("function_call get_time", "{}"),
]  # fmt: skip


def test_reasoning_text_and_calls_are_items(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(ANSWER)
    response = ask(openai_client, tool_choice="auto", reasoning={"effort": "low"})
    assert told(response.output) == EXPECTED
    assert (response.output_text, response.status) == ("I look.", "completed")
    assert response.output[2].call_id != response.output[3].call_id
    assert [(tool.name, tool.type) for tool in response.tools] == [
        ("get_weather", "function"),
        ("get_time", "function"),
    ]
    assert (response.tool_choice, response.reasoning.effort) == ("auto", "low")


def test_the_events_of_a_stream_build_the_same_items(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(ANSWER)
    with openai_client.responses.stream(model="tiny", input="Hi", tools=TOOLS) as stream:  # type: ignore[arg-type]
        events = list(stream)
        assert told(stream.get_final_response().output) == EXPECTED
    built: dict[int, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            built[event.output_index] = built.get(event.output_index, "") + event.delta  # type: ignore[union-attr]
    assert list(built.values()) == [text for _, text in EXPECTED]
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert done == [event.item.id for event in events if event.type == "response.output_item.added"]
    assert sum(event.type == "response.function_call_arguments.delta" for event in events) > 5  # as they come
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_output_is_the_input_of_the_next_turn(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(ANSWER)
    first = ask(openai_client)
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"Result of {item.name}."}
        for item in first.output if item.type == "function_call"
    ]  # fmt: skip
    results[1]["output"] = [{"type": "input_text", "text": "Noon."}]
    gateway.engine.script = says("<think>\n\n</think>\n\nIt is sunny.")
    items = [{"role": "user", "content": "Rain?"}, *(item.model_dump() for item in first.output), *results]
    assert ask(openai_client, input=items).output_text == "It is sunny."
    prompt = text_of(gateway.engine.submits[-1])
    assert prompt.count("<|im_start|>assistant") == 2, "one turn for all items of the first answer"
    assert '{"name": "get_weather", "arguments": {"city": "Zürich"}}' in prompt
    assert "<tool_response>\nResult of get_weather.\n</tool_response>" in prompt
    assert "<tool_response>\nNoon.\n</tool_response>" in prompt


def test_an_item_may_stand_alone(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.set_info(max_seq_len=4000)
    gateway.engine.script = says("Yes.")
    for item in ({"type": "reasoning", "summary": []}, {"type": "function_call", "call_id": "a", "name": "f"}):
        assert http.post(RESPONSES, {"input": [item]}).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_does_not_parse_is_a_message(
    openai_client: openai.OpenAI, gateway: GatewayProcess, stream: bool
) -> None:
    gateway.engine.script = says(BROKEN)
    answer = ask(openai_client, stream=stream)
    if not stream:
        assert told(answer.output) == [("message", BROKEN)]
        return
    events = list(answer)
    assert told(events[-1].response.output) == [("message", BROKEN)]
    items = [event.item for event in events if event.type == "response.output_item.done"]
    assert [(item.type, item.status) for item in items if item.type == "function_call"] == [
        ("function_call", "incomplete")
    ]


def test_a_cut_answer_is_incomplete_and_reasoning_alone_is_no_message(
    openai_client: openai.OpenAI, gateway: GatewayProcess
) -> None:
    gateway.engine.script = says("<think>\nIt may rain, or it may not.")
    response = ask(openai_client, max_output_tokens=20)
    assert [(item.type, item.status) for item in response.output] == [("reasoning", "incomplete")]
    assert (response.status, response.output_text) == ("incomplete", "")
    events = list(ask(openai_client, max_output_tokens=20, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output[0].status == "incomplete"


def test_choices_of_tools(openai_client: openai.OpenAI, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(CALL + TIME_CALL)
    assert told(ask(openai_client, tool_choice="none").output) == [("message", CALL + TIME_CALL)]
    assert "get_weather" not in text_of(gateway.engine.submits[-1])
    assert [kind for kind, _ in told(ask(openai_client, parallel_tool_calls=False).output)] == [
        "function_call get_weather"
    ]
    some = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}
    response = ask(openai_client, tool_choice=some)
    assert response.tool_choice.tools == [{"type": "function", "name": "get_time"}]
    prompt = text_of(gateway.engine.submits[-1])
    assert ("get_time" in prompt, '"name": "get_weather", "desc' in prompt) == (True, False)
    assert [kind for kind, _ in told(response.output)] == ["message", "function_call get_time"]


def test_some_of_the_tools_can_be_chosen_in_chats_too(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.set_info(max_seq_len=4000)
    gateway.engine.script = says(CALL)
    tools = [weather_tool("get_weather"), weather_tool("get_time")]
    some = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": some}
    ask = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools, "tool_choice": choice}
    answer = http.post("/v1/chat/completions", ask).json["choices"][0]["message"]
    assert answer["content"] == CALL
    some["tools"] = [{"type": "function", "function": {"name": "rm"}}]
    refused = http.post("/v1/chat/completions", {**ask, "tool_choice": choice})
    assert (refused.status, refused.error["param"]) == (400, "tool_choice")
    assert "'rm', which is not among the tools: get_weather, get_time" in refused.error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "1 to 64 letters"),
        ({"tools": [{"type": "custom", "name": "a"}]}, "tools", "no tools of its own"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "not among the tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice", "must be auto, none, required"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "x"}}, "tool_choice", "must have a mode"),
        ({"tool_choice": "required"}, "tool_choice", "offers no tools"),
        ({"reasoning": "much"}, "reasoning", "must be an object such as"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input", "input[0] lacks call_id"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "["}]},
            "input", "input[0].arguments must be a string with a JSON object",
        ),
        ({"input": [{"type": "reasoning", "content": [{"type": "image"}]}]}, "input", "reasoning_text"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "input[0] lacks call_id"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_way_out(http: HttpServer, fields: Any, param: str | None, words: str) -> None:
    answer = http.post(RESPONSES, {"input": "Hi", **fields})
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param
    assert words in answer.error["message"]


def test_text_after_a_call_is_a_message_of_its_own(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.set_info(max_seq_len=4000)
    gateway.engine.script = says(CALL + "Done.")
    body = http.post(RESPONSES, {"input": "Hi", "tools": TOOLS, "stream": True}).body.decode()
    last = json.loads(body.strip().split("\n")[-1].removeprefix("data: "))["response"]
    assert [item["type"] for item in last["output"]] == ["function_call", "message"]


@pytest.mark.parametrize(("answer", "expected"), [
    ("Hello", "Hello"), ("Grüße 🎉", "Grüße 🎉"), ("<think>\nHm.\n</think>\n\nYes", "Yes"), (ANSWER, "I look."),
    (BROKEN, BROKEN), (CALL, None),
])  # fmt: skip
def test_log_probabilities_are_those_of_the_messages_tokens(
    openai_client: openai.OpenAI, gateway: GatewayProcess, answer: str, expected: str | None
) -> None:
    gateway.engine.script = says(answer)
    options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = ask(openai_client, **options)
    assert response.top_logprobs == 2
    with openai_client.responses.stream(model="tiny", input="Hi", tools=TOOLS, **options) as stream:  # type: ignore[arg-type]
        events = list(stream)
        streamed = stream.get_final_response()
    assert told(streamed.output) == told(response.output)
    if expected is None:
        assert {item.type for item in response.output} == {"function_call"}
        return
    [part] = [item.content[0] for item in response.output if item.type == "message"]
    [streamed_part] = [item.content[0] for item in streamed.output if item.type == "message"]
    assert part.text == expected
    assert streamed_part.logprobs == part.logprobs
    assert len(part.logprobs) == len(expected.encode()), "a token of this model is a byte"
    assert all((each.logprob, len(each.top_logprobs)) == (-0.5, 2) for each in part.logprobs)
    sent = [each for event in events if event.type == "response.output_text.delta" for each in event.logprobs]
    assert [each.token for each in sent] == [each.token for each in part.logprobs]


def test_a_response_has_log_probabilities_only_if_they_are_asked_for(
    openai_client: openai.OpenAI, gateway: GatewayProcess
) -> None:
    import openai

    gateway.engine.script = says("Hello")
    for options, count in (({"include": ["reasoning.encrypted_content"]}, 0), ({"top_logprobs": 1}, 5)):
        [item] = ask(openai_client, **options).output
        assert len(item.content[0].logprobs) == count
    for wrong in ({"top_logprobs": 21}, {"include": "x"}):
        with pytest.raises(openai.BadRequestError):
            ask(openai_client, **wrong)
