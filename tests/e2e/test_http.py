"""The HTTP server on a real model: what a newcomer's curl gets."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.servers.http_client import get, post
from mgpu import Client
from mgpu.launch.server_process import ServerProcess

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NAME = "smollm2"
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.http_url()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.wait_ready()) as client:
        yield client


def test_the_log_says_where_http_is(server: ServerProcess, url: str) -> None:
    assert f"HTTP (OpenAI-compatible) on {url}" in server.output()
    assert "sampling of requests that do not say: temperature 0 (greedy)" in server.output()


def test_models_lists_the_one_model(url: str) -> None:
    [model] = get(url, "/v1/models").json["data"]
    assert model["id"] == NAME
    assert model["max_model_len"] == 1024
    assert get(url, f"/v1/models/{NAME}").json == model
    assert get(url, "/v1/models/other").status == 404


def test_a_chat_is_the_front_channels_answer(url: str, client: Client) -> None:
    expected = client.chat(HELLO, max_tokens=8)
    answer = post(url, CHAT, {"model": NAME, "messages": HELLO, "max_tokens": 8}).json
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert answer["model"] == NAME


def test_a_streamed_chat_is_the_same_answer_in_pieces(url: str, client: Client) -> None:
    expected = client.chat(HELLO, max_tokens=8)
    body = {"messages": HELLO, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
    answer = post(url, CHAT, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = answer.events
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == expected.finish_reason
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == expected.usage.prompt_tokens + expected.usage.completion_tokens


def test_prompts_are_completed_each_with_its_choices(url: str, client: Client) -> None:
    body = {"prompt": ["One, two,", [504, 253]], "n": 2, "max_tokens": 3, "temperature": 1, "seed": 7}
    expected = [client.generate(each, n=2, max_tokens=3, temperature=1, seed=7) for each in body["prompt"]]  # type: ignore[attr-defined]
    texts = [choice.text for completion in expected for choice in completion.choices]
    choices = post(url, TEXT, body).json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == texts
    pieces: dict[int, str] = dict.fromkeys(range(4), "")
    for event in post(url, TEXT, {**body, "stream": True}).events[:-1]:
        pieces[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(pieces.values()) == texts


def test_health_says_ready_and_live(url: str) -> None:
    assert get(url, "/health").json["status"] == "ready"
    assert get(url, "/health/live").status == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
        ({"messages": HELLO, "model": "gpt-4"}, 404, "model"),
        ({"messages": HELLO, "max_tokens": 5000}, 400, None),
        ({"messages": HELLO, "top_logprobs": 3}, 400, "top_logprobs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages"),
    ],
)
def test_a_wrong_field_is_named_in_openais_form(url: str, body: object, status: int, param: str | None) -> None:
    answer = post(url, CHAT, body)
    assert answer.status == status
    assert answer.error["param"] == param


def test_unknown_fields_are_accepted_and_named_in_a_header_and_once_in_the_log(server: ServerProcess, url: str) -> None:
    body = {"messages": HELLO, "max_tokens": 1, "gizmo": {"a": 1}, "user": "me", "x\r\ny": 1}
    for _ in range(2):
        answer = post(url, CHAT, body)
        assert answer.status == 200
        assert answer.headers["warning"] == '299 mgpu "fields without effect: gizmo, x\\r\\ny"'
    assert server.output().count("gizmo") == 1


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{}", "text/plain", 415),
        (b"", "", 415),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"messages": "\xff"}', "application/json", 400),
        (b'{"temperature": NaN}', "application/json", 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"x" * (5 << 20), "application/json", 413),
    ],
)
def test_a_body_that_cannot_be_used_is_an_error_and_the_next_is_served(
    url: str, body: bytes, content_type: str, status: int
) -> None:
    answer = post(url, CHAT, body, **{"content-type": content_type})
    assert answer.status == status
    assert answer.error["message"]
    assert get(url, "/health/live").status == 200


def test_other_paths_and_methods_say_so(url: str) -> None:
    assert get(url, "/nothing").error["code"] == "not_found"
    answer = get(url, CHAT)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


def test_the_page_of_metrics_answers_every_query_of_the_grafana_dashboard(url: str) -> None:
    post(url, CHAT, {"messages": HELLO, "max_tokens": 4})
    families = list(text_string_to_metric_families(get(url, "/metrics").body.decode()))
    values = {sample.name: sample.value for family in families for sample in family.samples}
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in targets for name in re.findall(r"(?:vllm|mgpu):[a-z0-9_]+", query)}
    assert asked - values.keys() == {"mgpu:gpu_memory_used_bytes"}, "a server without GPUs has no memory of theirs"
    assert "mgpu:gpu_memory_used_bytes" in {family.name for family in families}
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert values[f"vllm:{name}_seconds_count"] >= 1, name
    assert values["vllm:generation_tokens_total"] >= 4
