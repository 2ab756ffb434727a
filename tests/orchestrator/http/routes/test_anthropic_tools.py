"""Tools and thinking in Anthropic's messages, by the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from harness.answers.tool_templates import CALL, QWEN, THOUGHT, weather_tool
from harness.servers.gateway_process import GatewayProcess, make_model_folder, says, text_of
from harness.servers.http_process import HttpServer

if TYPE_CHECKING:
    import anthropic

HELLO = [{"role": "user", "content": "Hi"}]
_FUNCTION = weather_tool()["function"]
TOOLS = [{"name": "get_weather", "description": "Weather.", "input_schema": _FUNCTION["parameters"]}]


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("model"), QWEN)) as gateway:
        yield gateway


@pytest.fixture
def client(http: HttpServer, gateway: GatewayProcess) -> Iterator[anthropic.Anthropic]:
    import anthropic  # takes two seconds: only where it is used, not in every process that collects tests

    gateway.set_info(max_seq_len=4000)
    with anthropic.Anthropic(base_url=http.url, api_key="none", max_retries=0) as client:
        yield client


def options(**more: Any) -> Any:
    return {"model": "tiny", "max_tokens": 1000, "messages": HELLO, "tools": TOOLS, **more}


def test_calls_and_thoughts_are_blocks(client: anthropic.Anthropic, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(THOUGHT + "I look.\n" + CALL)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = client.messages.create(**options(thinking=thinking))
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
    assert answer.content[0].thinking == "It may rain."
    assert (answer.content[2].name, answer.content[2].input) == ("get_weather", {"city": "Zürich"})
    assert answer.stop_reason == "tool_use"
    assert text_of(gateway.engine.submits[-1]).endswith("assistant\n")
    unasked = client.messages.create(**options())
    assert [block.type for block in unasked.content] == ["text", "tool_use"]
    with client.messages.stream(**options(thinking=thinking)) as stream:
        partial = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert "".join(partial) == '{"city": "Zürich"}'
    assert len(partial) > 10
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
    assert (streamed.content[2].input, streamed.stop_reason) == ({"city": "Zürich"}, "tool_use")


def test_the_end_of_a_call_and_text_in_one_piece_stay_apart(
    client: anthropic.Anthropic, gateway: GatewayProcess
) -> None:
    gateway.engine.script = says(CALL + "\nDone.")
    # What may be the beginning of the stop sequence is held back, and comes as one piece when it is not.
    stop = '"}}\n</tool_call>\nDone!'
    with client.messages.stream(**options(stop_sequences=[stop])) as stream:
        call, text = stream.get_final_message().content
    assert (call.type, call.input) == ("tool_use", {"city": "Zürich"})  # type: ignore[union-attr]
    assert (text.type, text.text) == ("text", "Done.")  # type: ignore[union-attr]


def test_a_model_thinks_only_if_it_is_asked_to(client: anthropic.Anthropic, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(THOUGHT + "A")
    [block] = client.messages.create(**options()).content
    assert block.text == "A"
    assert text_of(gateway.engine.submits[-1]).endswith("<think>\n\n</think>\n\n")


def test_results_of_calls_reach_the_template(client: anthropic.Anthropic, gateway: GatewayProcess) -> None:
    gateway.engine.script = says(CALL)
    answer = client.messages.create(**options())
    gateway.engine.script = says("Sunny.")
    results = [{"type": "tool_result", "tool_use_id": answer.content[0].id, "content": [{"type": "text", "text": "☀"}]}]
    turns = [*HELLO, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    assert client.messages.create(**options(messages=turns)).content[0].text == "Sunny."
    assert '{"name": "get_weather", "arguments": {"city": "Zürich"}}' in text_of(gateway.engine.submits[-1])
    assert "<tool_response>\n☀\n</tool_response>" in text_of(gateway.engine.submits[-1])
    assert client.messages.count_tokens(model="tiny", messages=turns, tools=TOOLS).input_tokens > 100  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools of the client only"),
        ({"tools": TOOLS * 2}, "as that of tools"),
        ({"tool_choice": {"type": "sometimes"}}, "must be"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "not among the tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "no message before",
        ),
        ({"thinking": {"type": "deep"}}, "must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\].type"),
    ],
)
def test_what_is_wrong_is_said(client: anthropic.Anthropic, more: dict[str, Any], words: str) -> None:
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match=words):
        client.messages.create(**options(**more))
