"""Through a real gateway: an engine that follows its grammars ends reasoning within the budget of the request."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

from harness.answers.grammar_follower import GrammarFollower
from harness.answers.tool_templates import HARMONY, QWEN, weather_tool
from harness.servers.gateway_process import EOS, GatewayProcess, make_model_folder, says
from mgpu import Client, RequestFailed
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.internal.gateway_messages import Submit
from mgpu.protocol.internal.worker_messages import Vocabulary

ASKED = [{"role": "user", "content": "x"}]
BEGIN, END = 260, 261
TOKENS = [bytes([number]) for number in range(256)] + [
    b"<s>",
    b"</s>",
    b"<|start|>",
    b"<|end|>",
    b"<think>",
    b"</think>",
]
VOCABULARY = Vocabulary(0, [*TOKENS, *[b""] * (300 - len(TOKENS))], [256, 257, 258, 259])


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    # The messages decide whether the template begins the reasoning.
    template = QWEN + "{% if messages[-1].content == 'open' %}<think>{% endif %}"
    folder = make_model_folder(tmp_path_factory.mktemp("model"), template, ["<think>", "</think>"])
    with GatewayProcess(folder) as gateway:
        yield gateway


@pytest.fixture
def thinker(gateway: GatewayProcess) -> GatewayProcess:
    gateway.set_info(max_seq_len=4000)
    gateway.engine.script = thinks_on_and_on
    return gateway


def thinks_on_and_on(submit: Submit) -> Iterator[int]:
    """Think without end; where that is not allowed, end; else take what is allowed first."""
    begins = [] if int32_array(submit.token_ids)[-1] == BEGIN else [BEGIN]
    if submit.sampling.grammar is None:
        yield from begins
        while True:
            yield ord("t")
    answer = GrammarFollower(submit.sampling.grammar.text, VOCABULARY, submit.sampling.grammar.stop_ids)
    wanted, has_closed = iter(begins), False
    while True:
        allowed = answer.allowed()
        token = next(wanted, EOS if EOS in allowed and has_closed else ord("t"))
        token = token if token in allowed else min(allowed - {10, 32}, default=min(allowed))
        has_closed = has_closed or token == END
        yield token
        answer.take([token])


@pytest.mark.parametrize("content", ["open", "x"])
def test_a_model_that_thinks_on_and_on_answers_after_the_budget(
    thinker: GatewayProcess, client: Client, content: str
) -> None:
    asked = [{"role": "user", "content": content}]
    assert client.chat(asked, max_tokens=9).finish_reason == "length"
    done = client.chat(asked, max_tokens=50, thinking_token_budget=7)
    assert (done.reasoning, done.text, done.finish_reason) == ("t" * 7, "", "stop")
    formed = client.chat(asked, max_tokens=50, thinking_token_budget=3, choice=["yes"])
    assert (formed.reasoning, formed.text) == ("ttt", "yes")
    demanded: Any = {"tools": [weather_tool()], "tool_choice": "get_weather", "thinking_token_budget": 2}
    [submit] = [client.chat(asked, max_tokens=4, **demanded) and thinker.engine.submits[-1]]
    assert submit.sampling.grammar is not None
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    answer = GrammarFollower(submit.sampling.grammar.text, VOCABULARY, [EOS])
    answer.take([*([] if content == "open" else [BEGIN]), ord("t"), END, 10, *call.encode(), EOS])


def test_a_form_without_a_budget_has_no_room_for_reasoning(thinker: GatewayProcess, client: Client) -> None:
    done = client.chat([{"role": "user", "content": "open"}], max_tokens=9, choice=["yes"])
    assert (done.reasoning, done.text) == ("", "yes")


def test_a_model_that_does_not_reason_has_nothing_to_bound(tmp_path: Path) -> None:
    with GatewayProcess(make_model_folder(tmp_path)) as gateway, Client(gateway.endpoint) as client:
        gateway.engine.script = says("ab")
        assert client.chat(ASKED, thinking_token_budget=1).text == "ab"
        assert gateway.engine.submits[-1].sampling.grammar is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"thinking_token_budget": -1}, "thinking_token_budget must be an integer from 0"),
        ({"thinking_token_budget": 1.5}, "thinking_token_budget must be"),
        ({"thinking_token_budget": 5, "ignore_eos": True}, "ignore_eos does not go with"),
        ({"thinking_token_budget": 5, "stop_token_ids": [END]}, f"stop_token_ids has {END}, which is </think>"),
    ],
)
def test_what_is_wrong_is_said(thinker: GatewayProcess, client: Client, options: Any, words: str) -> None:
    with pytest.raises(RequestFailed, match=words):
        client.chat(ASKED, **options)
    with pytest.raises(RequestFailed, match="only applies to messages"):
        client.generate("x", thinking_token_budget=5)


def test_gpt_oss_is_made_to_call_by_its_own_tokens(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path, HARMONY, ["<|channel|>", "<|message|>", "<|constrain|>", "<|call|>"])
    with GatewayProcess(folder) as gateway, Client(gateway.endpoint) as client:
        gateway.set_info(max_seq_len=4000)
        call = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "A"}'
        gateway.engine.script = says(call)
        asked: Any = {"tools": [weather_tool()], "tool_choice": "get_weather", "thinking_token_budget": 3}
        [found] = client.chat(ASKED, **asked).tool_calls
        assert (found.name, found.arguments) == ("get_weather", {"city": "A"})
        grammar = gateway.engine.submits[-1].sampling.grammar
    assert grammar is not None
    assert "thinking[max_tokens=3]" in grammar.text
