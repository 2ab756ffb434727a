"""POST /v1/chat/completions and /v1/completions: each option arrives, and answers have OpenAI's forms."""

import json
import time
from typing import Any

import pytest

from harness.servers.gateway_process import EOS, GatewayProcess, says
from harness.servers.http_client import JSON_TYPE, connection_to, opened
from harness.servers.http_process import HttpServer
from harness.waiting import eventually
from mgpu.protocol.internal.worker_messages import LogitBias

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]


def chat(http: HttpServer, **fields: Any) -> Any:
    answer = http.post(CHAT, {"messages": HELLO, **fields})
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1}, {"temperature": 0.5, "top_p": 0.9, "top_k": 7}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1.0, "frequency_penalty": -1.0}),
        ({"repetition_penalty": 1.5, "seed": 5}, {"repetition_penalty": 1.5, "seed": 5}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"logit_bias": {"65": 5, "66": -100}}, {"logit_bias": LogitBias.of([(65, 5.0), (66, -100.0)])}),
        ({"logprobs": True}, {"num_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"num_logprobs": 3}),
        ({"min_p": 0.25, "temperature": None}, {"min_p": 0.25}),
    ],
)
def test_sampling_options_arrive(
    http: HttpServer, gateway: GatewayProcess, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    chat(http, max_tokens=1, **fields)
    [submit] = gateway.engine.submits
    for name, value in expected.items():
        assert getattr(submit.sampling, name) == value


def test_other_options_arrive(http: HttpServer, gateway: GatewayProcess) -> None:
    chat(http, max_completion_tokens=3, priority=-2, cache_salt="x", stop_token_ids=[9], ignore_eos=True, n=2)
    first, second = gateway.engine.submits
    assert (first.max_tokens, first.priority, first.cache_salt, first.stop_token_ids) == (3, -2, b"x", [9])
    assert second.sampling.seed != first.sampling.seed


def test_max_completion_tokens_wins_over_the_older_name(http: HttpServer, gateway: GatewayProcess) -> None:
    chat(http, max_tokens=9, max_completion_tokens=2)
    assert gateway.engine.submits[0].max_tokens == 2


def test_a_stop_text_ends_the_answer(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("one two three")
    for stop in ("two", ["x", "two"]):
        [choice] = chat(http, stop=stop)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("one ", "stop")


def test_parts_of_text_are_joined_by_line_breaks(http: HttpServer, gateway: GatewayProcess) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    texts = [
        http.post("/apply-template", {"messages": [{"role": "user", "content": content}]}).json["prompt"]
        for content in (parts, "one\ntwo")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}])
def test_images_and_audio_are_refused_with_a_sentence(http: HttpServer, part: dict[str, Any]) -> None:
    answer = http.post(CHAT, {"messages": [{"role": "user", "content": [part]}]})
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "takes text only" in answer.error["message"]


def test_logprobs_have_the_forms_of_their_endpoints(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("ab", then=None)
    content = chat(http, max_tokens=2, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [(each["token"], each["bytes"], len(each["top_logprobs"])) for each in content] == [
        ("a", [97], 2), ("b", [98], 2),
    ]  # fmt: skip
    found = http.post(TEXT, {"prompt": "x", "max_tokens": 2, "logprobs": 2}).json["choices"][0]["logprobs"]
    assert (found["tokens"], found["text_offset"]) == (["a", "b"], [0, 1])
    assert [len(top) for top in found["top_logprobs"]] == [2, 2]
    events = http.post(TEXT, {"prompt": "x", "max_tokens": 2, "logprobs": 0, "stream": True}).events[:-1]
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in events]
    assert [offset for each in offsets for offset in each] == [0, 1]


def test_choices_stream_side_by_side(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("abc")
    events = http.post(CHAT, {"messages": HELLO, "n": 3, "stream": True}).events
    assert events[-1] == "[DONE]"
    texts, ends = ["", "", ""], set()
    for event in events[:-1]:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
        if choice["finish_reason"]:
            ends.add((choice["index"], choice["finish_reason"]))
    assert texts == ["abc"] * 3
    assert ends == {(0, "stop"), (1, "stop"), (2, "stop")}


def test_completions_echo_and_their_short_default(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("y" * 100)
    plain = http.post(TEXT, {"prompt": ["ab", "cd"], "echo": True}).json
    assert [choice["text"] for choice in plain["choices"]] == ["ab" + "y" * 16, "cd" + "y" * 16]
    texts = {0: "", 1: ""}
    for event in http.post(TEXT, {"prompt": ["ab", "cd"], "echo": True, "stream": True}).events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(texts.values()) == ["ab" + "y" * 16, "cd" + "y" * 16]
    ids = http.post(TEXT, {"prompt": [97, 98], "echo": True, "max_tokens": 1}).json
    assert ids["choices"][0]["text"] == "aby"


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"best_of": 3},
        {"echo": True, "logprobs": 1},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": ["x", ""]},
        {"prompt": [[]]},
        {"prompt": {"a": 1}},
        {"prompt": ["x"] * 257},
        {"prompt": [1, "x"]},
        {"max_tokens": 0},
        {"logprobs": 21},
        {"stop": [""]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"99999": 1}},
        {"n": 17},
        {"seed": 1.5},
        {"stream_options": 5},
    ],
)
def test_what_cannot_be_is_a_400_that_names_a_field(http: HttpServer, fields: dict[str, Any]) -> None:
    answer = http.post(TEXT, {"prompt": "x", **fields})
    assert answer.status == 400
    assert any(name in answer.error["message"] for name in fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"functions": [{"name": "f"}]}, "send tools"),
        ({"response_format": {"type": "xml"}}, "response_format must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_schema lacks a schema"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "exactly one of"),
        ({"guided_regex": 5}, "guided_regex.regex must be"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "one form of the answer"),
        ({"guided_regex": "a", "min_tokens": 5}, "min_tokens does not go with structured_outputs"),
        ({"guided_json": {"properties": {"a": {"not": {}}}}}, "at #/properties/a"),
        ({"modalities": ["audio"]}, "text only"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "one of system"),
        ({"messages": [{"role": "user"}]}, "lacks content"),
        ({"messages": "Hi"}, "an array of 1 to 2048"),
        ({"messages": ["Hi"]}, "an object such as"),
        ({"chat_template_kwargs": {"messages": 1}}, "must not have messages"),
    ],
)
def test_what_a_chat_cannot_be_says_why(http: HttpServer, fields: dict[str, Any], words: str) -> None:
    answer = http.post(CHAT, {"messages": HELLO, **fields})
    assert answer.status == 400
    assert words in answer.error["message"]


def test_harmless_values_of_fields_that_are_not_supported_pass(http: HttpServer) -> None:
    chat(http, max_tokens=1, tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"])


def test_a_full_server_answers_429_with_the_time_to_wait(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.going.clear()
    with opened(http.url, "POST", TEXT, {"prompt": ["x"] * 200, "n": 16, "max_tokens": 9}) as response:
        assert response.status == 429
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 250
    gateway.engine.going.set()


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_a_server_that_takes_no_requests_answers_503(http: HttpServer, gateway: GatewayProcess, state: str) -> None:
    gateway.set_info(state=state)
    answer = http.post(TEXT, {"prompt": "x"})
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    health = http.get("/health")
    assert (health.status, health.json["status"]) == (503, state)
    assert http.get("/health/live").status == 200


def test_health_answers_soon_while_the_gateway_is_away(model_folder: Any) -> None:
    with GatewayProcess(model_folder) as gateway, HttpServer(gateway.endpoint) as http:
        assert http.get("/health").status == 200
        gateway.kill()
        began_s = time.monotonic()
        answer = http.get("/health")
        assert (answer.status, answer.json["status"]) == (503, "unreachable")
        assert time.monotonic() - began_s < 10
        assert http.get("/health/live").status == 200
        gateway.replace()
        eventually(lambda: http.get("/health").status == 200, lambda: str(http.get("/health")))


def test_an_engine_error_is_a_500_and_ends_a_stream_with_an_event(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.error = "the engine failed"
    answer = http.post(TEXT, {"prompt": "x"})
    assert (answer.status, answer.error["code"]) == (500, "engine_error")
    events = http.post(CHAT, {"messages": HELLO, "stream": True}).events
    assert events[-1]["error"]["code"] == "engine_error"


@pytest.mark.parametrize("options", [
    {"chat_template_kwargs": {"a": {str(number): 1 for number in range(1025)}}},
    {"chat_template_kwargs": {"a": [0] * 65_537}},
    {"chat_template_kwargs": {"a": [[]] * 8_200}},
])  # fmt: skip
def test_what_the_front_channel_cannot_carry_ends_no_other_stream(
    http: HttpServer, gateway: GatewayProcess, options: dict[str, object]
) -> None:
    gateway.engine.script = says("abcd")
    gateway.engine.going.clear()
    with opened(http.url, "POST", TEXT, {"prompt": "x", "max_tokens": 4, "stream": True}) as response:
        gateway.engine.wait(lambda: len(gateway.engine.submits) == 1)
        answer = http.post(CHAT, {"messages": HELLO, **options})
        assert (answer.status, answer.error["code"]) == (400, "invalid_value")
        assert "exceeds max_" in answer.error["message"] or "more than 8192" in answer.error["message"]
        gateway.engine.going.set()
        text = response.read().decode()
    assert "error" not in text
    assert text.count('"finish_reason":"length"') == 1


def test_a_gateway_that_is_replaced_costs_a_stream_nothing(model_folder: Any) -> None:
    with GatewayProcess(model_folder) as gateway, HttpServer(gateway.endpoint) as http:
        gateway.engine.script = says("abcdefgh" * 20)
        body = {"prompt": "x", "max_tokens": 160, "stream": True}
        expected = [event["choices"][0]["text"] for event in http.post(TEXT, body).events[:-1]]
        with opened(http.url, "POST", TEXT, body) as response:
            first = response.readline()
            gateway.engine.going.clear()
            gateway.kill()
            gateway.replace()
            gateway.engine.going.set()
            rest = response.read()
        text = (first + rest).decode()
        assert "".join(expected) == "abcdefgh" * 20
        assert text.count('"finish_reason":"length"') == 1
        pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == "".join(expected)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_cancels_its_request(http: HttpServer, gateway: GatewayProcess, stream: bool) -> None:
    gateway.engine.going.clear()
    connection = connection_to(http.url)
    body = json.dumps({"prompt": ["x", "y"], "n": 2, "max_tokens": 200, "stream": stream})
    connection.request("POST", TEXT, body, JSON_TYPE)
    gateway.engine.wait(lambda: len(gateway.engine.submits) == 4)
    connection.close()
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 4)


def test_the_end_token_ends_unless_it_is_ignored(http: HttpServer, gateway: GatewayProcess) -> None:
    assert EOS not in gateway.engine.submits
    gateway.engine.script = says("ab")
    assert chat(http, max_tokens=9)["choices"][0]["finish_reason"] == "stop"
    assert chat(http, max_tokens=9, ignore_eos=True)["choices"][0]["finish_reason"] == "length"
