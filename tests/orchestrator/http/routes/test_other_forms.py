"""The other paths: responses, Anthropic's messages, texts and tokens, and the document of all of them."""

import json
from typing import Any

import pytest

from harness.servers.gateway_process import GatewayProcess, says
from harness.servers.http_process import HttpServer
from mgpu import __version__
from mgpu.orchestrator.http.routes.text import DETOKENIZE_RULES
from mgpu.protocol.front.fields import FieldError

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
HELLO = [{"role": "user", "content": "Hi"}]


def named_events(body: bytes) -> list[tuple[str, Any]]:
    found = []
    for block in body.decode().split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n")
            found.append((name[7:], json.loads(data[6:])))
            assert found[-1][1]["type"] == name[7:]
    return found


def test_a_response_has_one_message_and_what_it_used(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("Hello")
    body = http.post(RESPONSES, {"input": "Hi", "instructions": "Be kind", "metadata": {"a": "b"}}).json
    [item] = body["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert (body["status"], body["store"], body["metadata"]) == ("completed", False, {"a": "b"})
    assert body["usage"]["output_tokens"] == 6
    cut = http.post(RESPONSES, {"input": HELLO, "max_output_tokens": 2}).json
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_streamed_response_tells_its_events_in_order(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("Hello")
    events = named_events(http.post(RESPONSES, {"input": "Hi", "stream": True}).body)
    names = [name.removeprefix("response.") for name, _ in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert "".join(data["delta"] for name, data in events if name.endswith("delta")) == "Hello"
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    gateway.engine.error = "broken"
    last, data = named_events(http.post(RESPONSES, {"input": "Hi", "stream": True}).body)[-1]
    assert (last, data["response"]["status"]) == ("response.failed", "failed")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, "keeps no responses"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "no function_call before it"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "items of type message"),
        ({"input": []}, "1 to 2048"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format lacks a schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format must be"),
        ({"tools": [{"type": "web_search"}]}, "no tools of its own"),
        ({"background": True}, "while you wait"),
    ],
)
def test_what_a_response_cannot_be_says_why(http: HttpServer, fields: dict[str, Any], words: str) -> None:
    answer = http.post(RESPONSES, {"input": "Hi", **fields})
    assert answer.status == 400
    assert words in answer.error["message"]


def test_messages_are_answered_in_anthropics_form(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("Hello")
    system = [{"type": "text", "text": "Be kind", "cache_control": {"type": "ephemeral"}}]
    body = http.post(MESSAGES, {"messages": HELLO, "max_tokens": 9, "system": system}).json
    assert body["content"] == [{"type": "text", "text": "Hello"}]
    assert (body["role"], body["type"], body["stop_reason"]) == ("assistant", "message", "end_turn")
    assert body["usage"]["cache_read_input_tokens"] == 3
    counted = http.post(f"{MESSAGES}/count_tokens", {"messages": HELLO, "system": system}).json["input_tokens"]
    assert body["usage"]["input_tokens"] + 3 == counted
    cut = http.post(MESSAGES, {"messages": HELLO, "max_tokens": 2, "stop_sequences": ["zzz"]}, x_request_id="a1")
    assert cut.json["stop_reason"] == "max_tokens"
    assert (cut.headers["request-id"], cut.headers["x-request-id"]) == ("a1", "a1")


def test_streamed_messages_tell_anthropics_events_in_order(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("Hello")
    events = named_events(http.post(MESSAGES, {"messages": HELLO, "max_tokens": 9, "stream": True}).body)
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta") == "Hello"
    assert events[-2][1]["delta"]["stop_reason"] == "end_turn"
    assert events[-2][1]["usage"]["output_tokens"] == 6


@pytest.mark.parametrize(("sequences", "reason", "found", "text"), [
    (["zzz", "ll"], "stop_sequence", "ll", "He"),
    (["lo", "o"], "stop_sequence", "lo", "Hel"),
    (["zzz"], "end_turn", None, "Hello"),
    (["oo"], "end_turn", None, "Hello"),
])  # fmt: skip
def test_messages_say_which_stop_sequence_has_ended_them(
    http: HttpServer, gateway: GatewayProcess, sequences: list[str], reason: str, found: str | None, text: str
) -> None:
    gateway.engine.script = says("Hello")
    asked = {"messages": HELLO, "max_tokens": 9, "stop_sequences": sequences}
    body = http.post(MESSAGES, asked).json
    assert (body["stop_reason"], body["stop_sequence"], body["content"][0]["text"]) == (reason, found, text)
    events = named_events(http.post(MESSAGES, {**asked, "stream": True}).body)
    assert events[-2][1]["delta"] == {"stop_reason": reason, "stop_sequence": found}


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"messages": HELLO}, 400, "invalid_request_error"),
        ({"messages": HELLO, "max_tokens": 9, "model": "claude"}, 404, "not_found_error"),
        ({"messages": HELLO, "max_tokens": 9, "thinking": {"type": "deep"}}, 400, "invalid_request_error"),
    ],
)
def test_errors_of_messages_have_anthropics_form(http: HttpServer, body: Any, status: int, kind: str) -> None:
    answer = http.post(MESSAGES, body)
    assert answer.status == status
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == kind


LONG = "x" * (1_100_000)
STATUSES: list[tuple[Any, int, str, str]] = [
    ({"messages": [{"role": "tool", "content": "x"}]}, 422, "template_refused", "invalid_request_error"),
    ({"messages": HELLO, "model": "other"}, 404, "model_not_found", "not_found_error"),
    ({"messages": HELLO, "max_tokens": 9999}, 400, "context_length_exceeded", "invalid_request_error"),
    ({"messages": [{"role": "user", "content": LONG}]}, 413, "request_too_large", "request_too_large"),
    (b"x" * (5 << 20), 413, "request_too_large", "request_too_large"),
    (b"{", 400, "invalid_value", "invalid_request_error"),
]


@pytest.mark.parametrize(("body", "status", "code", "kind"), STATUSES)
def test_an_error_has_the_same_status_on_every_path_and_its_form(
    http: HttpServer, body: Any, status: int, code: str, kind: str
) -> None:
    whole = {"max_tokens": 5, "temperature": 1, **body} if isinstance(body, dict) else body
    openai, anthropic = http.post("/v1/chat/completions", whole), http.post(MESSAGES, whole)
    assert (openai.status, openai.error["code"]) == (status, code)
    assert (anthropic.status, anthropic.json["type"], anthropic.json["error"]["type"]) == (status, "error", kind)
    if isinstance(body, dict):
        streamed = http.post(MESSAGES, {**whole, "stream": True})
        assert (streamed.status, streamed.json["error"]["type"]) == (status, kind), "no stream has begun"


def test_a_full_and_a_loading_server_say_it_in_anthropics_form_too(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.set_info(state="starting")
    answer = http.post(MESSAGES, {"messages": HELLO, "max_tokens": 9})
    assert (answer.status, answer.json["error"]["type"]) == (503, "overloaded_error")
    assert int(answer.headers["retry-after"]) >= 1


def test_texts_become_tokens_and_back(http: HttpServer, gateway: GatewayProcess) -> None:
    found = http.post("/tokenize", {"prompt": "ab"}).json
    assert (found["tokens"][-2:], found["count"]) == ([97, 98], len(found["tokens"]))
    assert http.post("/tokenize", {"content": "ab", "add_special_tokens": False}).json["tokens"] == [97, 98]
    assert http.post("/tokenize", {"messages": HELLO}).json["count"] > 2
    assert http.post("/detokenize", {"tokens": [97, 98]}).json == {"prompt": "ab", "content": "ab"}
    assert http.post("/detokenize", {"tokens": []}).json["prompt"] == ""
    assert "Hi" in http.post("/apply-template", {"messages": HELLO}).json["prompt"]
    for wrong in ({}, {"prompt": "a", "content": "b"}, {"prompt": 5}):
        assert http.post("/tokenize", wrong).status == 400
    unknown = http.post("/detokenize", {"tokens": [97, 10**8]})
    assert (unknown.status, unknown.error["param"]) == (400, "tokens")
    assert unknown.error["message"].startswith("tokens has token id 100000000; the vocabulary has ids 0 to")
    assert http.post("/detokenize", {"tokens": [-1]}).status == 400
    million = [1] * (1 << 20)
    assert len(DETOKENIZE_RULES["tokens"].parse("tokens", million)) == 1 << 20  # type: ignore[arg-type]
    with pytest.raises(FieldError):
        DETOKENIZE_RULES["tokens"].parse("tokens", [*million, 1])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "ab"}),
        ("/detokenize", {"tokens": [97]}),
        ("/apply-template", {"messages": HELLO}),
        ("/v1/messages/count_tokens", {"messages": HELLO}),
    ],
)
def test_another_model_is_refused_wherever_one_can_be_named(http: HttpServer, path: str, body: dict[str, Any]) -> None:
    name = http.get("/v1/models").json["data"][0]["id"]
    assert http.post(path, {**body, "model": name}).status == 200
    assert http.post(path, {**body, "model": "gpt-5"}).status == 404


def test_the_document_has_every_path_with_its_fields(http: HttpServer) -> None:
    document = http.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) >= {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
        "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize", "/apply-template", "/health", "/health/ready",
        "/health/live", "/version",
    }  # fmt: skip
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "429", "503", "504"} <= set(chat["responses"])
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["messages"]
    assert {"temperature", "logit_bias", "min_p", "stop", "stream_options"} <= set(schema["properties"])


def test_the_version_is_told(http: HttpServer) -> None:
    assert http.get("/version").json == {"version": __version__}
