"""The budget of reasoning over HTTP: each form of it reaches the engine as a grammar."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("llguidance")

from harness.answers.tool_templates import QWEN
from harness.servers.gateway_process import GatewayProcess, make_model_folder, says
from harness.servers.http_process import HttpServer

HELLO = [{"role": "user", "content": "Hi"}]
ANTHROPIC = {"messages": HELLO, "max_tokens": 9, "model": "tiny"}


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = make_model_folder(tmp_path_factory.mktemp("model"), QWEN, ["<think>", "</think>"])
    with GatewayProcess(folder) as gateway:
        yield gateway


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": HELLO, "thinking_token_budget": 7}),
        ("responses", {"input": "Hi", "thinking_token_budget": 7}),
        ("messages", {**ANTHROPIC, "thinking": {"type": "enabled", "budget_tokens": 7}}),
    ],
)
def test_a_budget_becomes_a_grammar(http: HttpServer, gateway: GatewayProcess, path: str, body: dict[str, Any]) -> None:
    gateway.set_info(max_seq_len=4000)
    gateway.engine.script = says("A")
    assert httpx.post(f"{http.url}/v1/{path}", json=body).status_code == 200
    grammar = gateway.engine.submits[-1].sampling.grammar
    assert grammar is not None
    assert "{0,7}" in grammar.text


def test_thinking_without_a_budget_has_no_grammar(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("A")
    for thinking in ({"type": "enabled"}, {"type": "adaptive", "budget_tokens": 7}, {"type": "disabled"}):
        assert httpx.post(f"{http.url}/v1/messages", json={**ANTHROPIC, "thinking": thinking}).status_code == 200
        assert gateway.engine.submits[-1].sampling.grammar is None


@pytest.mark.parametrize("budget", [-1, "many", 2.5, True])
def test_a_wrong_budget_is_refused(http: HttpServer, gateway: GatewayProcess, budget: object) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", {"messages": HELLO, "thinking_token_budget": budget}),
        ("messages", {**ANTHROPIC, "thinking": {"type": "enabled", "budget_tokens": budget}}),
    ]
    for path, body in bodies:
        answer = httpx.post(f"{http.url}/v1/{path}", json=body)
        assert answer.status_code == 400
        assert "must be an integer from 0" in answer.json()["error"]["message"]
