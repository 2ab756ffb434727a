"""The requests of Open WebUI, replayed: its headers, and the odd fields of its chats, titles, tags and tool loops."""

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from harness.answers.tool_templates import QWEN, weather_tool
from harness.servers.gateway_process import GatewayProcess, make_model_folder, says, text_of
from harness.servers.http_process import HttpServer

HEADERS = {
    "content-type": "application/json", "authorization": "Bearer sk-none", "accept": "*/*",
    "accept-encoding": "gzip, deflate, br", "user-agent": "Python/3.12 aiohttp/3.12.15",
    "x-openwebui-user-name": "Zo%C3%AB M%C3%BCller", "x-openwebui-user-id": "f2b3a6c0-0000-4000-8000-000000000000",
    "x-openwebui-user-email": "zoe@example.com", "x-openwebui-user-role": "admin",
    "x-openwebui-chat-id": "local:9c1d", "cookie": "token=abc; oauth_session_id=1",
}  # fmt: skip
CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
USER = {"name": "Zoë", "id": "f2b3a6c0", "email": "zoe@example.com", "role": "admin"}


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("model"), QWEN)) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def long_context(gateway: GatewayProcess) -> None:
    gateway.set_info(max_seq_len=4000)


def chunks_of(body: bytes) -> list[Any]:
    """Read a stream as Open WebUI does: what is no line of data is skipped."""
    data = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data:")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def test_a_connection_is_verified_by_its_models(http: HttpServer) -> None:
    answer = http.get("/v1/models", **HEADERS)
    assert (answer.status, answer.json["object"]) == (200, "list")
    assert {"id", "object", "created", "owned_by"} <= answer.json["data"][0].keys()
    for path in ("/v1/embeddings", "/v1/audio/speech", "/v1/audio/models", "/api/tags", "/api/version"):
        assert http.get(path, **HEADERS).error["code"] == "not_found"


def test_a_chat_streams_with_its_usage(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("Hello")
    params = {
        "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "top_k": 40, "max_tokens": 100, "frequency_penalty": 0,
        "presence_penalty": 0.1, "repeat_penalty": 1.1, "seed": 0, "stop": ["\n\nUser:"], "logit_bias": {"97": -5},
        "reasoning_effort": "medium",
    }  # fmt: skip
    body = {"stream": True, "model": "tiny", "messages": [SYSTEM, QUESTION], **params}
    body |= {"stream_options": {"include_usage": True}, "user": USER}
    answer = http.post(CHAT, body, **HEADERS)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "repeat_penalty" in answer.headers["warning"]
    chunks = chunks_of(answer.body)
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each["choices"]) == "Hello"
    assert chunks[-1]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("limit", [{"max_completion_tokens": 100}, {"max_tokens": 100}, {}])
def test_titles_tags_and_queries_come_whole(http: HttpServer, gateway: GatewayProcess, limit: dict[str, int]) -> None:
    gateway.engine.script = says('{"title": "Hi"}')
    body = {"model": "tiny", "messages": [{"role": "user", "content": "### Task:\nTitle"}], "stream": False, **limit}
    answer = http.post(CHAT, body, **HEADERS)
    assert answer.json["choices"][0]["message"]["content"] == '{"title": "Hi"}'
    assert "warning" not in answer.headers


def test_a_tool_loop_sends_its_history_with_the_fields_of_a_stream(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("Sunny.")
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "Look."},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "input_text", "text": "Sunny"}]},
    ]
    for stream in (True, False):
        body = {"model": "tiny", "messages": history, "tools": [weather_tool()], "stream": stream}
        answer = http.post(CHAT, body, **HEADERS)
        if stream:
            assert (
                "".join(each["choices"][0]["delta"].get("content", "") for each in chunks_of(answer.body)) == "Sunny."
            )
        else:
            assert answer.json["choices"][0]["message"]["content"] == "Sunny."
    prompt = text_of(gateway.engine.submits[-1])
    assert "<tool_response>\nSunny\n</tool_response>" in prompt


def test_an_image_is_refused_with_a_sentence(http: HttpServer) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [*QUESTION["content"], image]}], "stream": True}
    answer = http.post(CHAT, body, **HEADERS)
    assert answer.status == 400
    assert "text only" in answer.error["message"]


def test_a_direct_connection_of_its_page_needs_the_origin(shared_gateway: GatewayProcess) -> None:
    page = "https://chat.example.com"
    with HttpServer(shared_gateway.endpoint, cors=(page,)) as server:
        connection = HTTPConnection("127.0.0.1", server.port)
        asked = {"origin": page, "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "authorization,content-type"
        connection.request("OPTIONS", CHAT, headers=asked)
        response = connection.getresponse()
        response.read()
        connection.close()
        assert (response.status, response.getheader("access-control-allow-origin")) == (200, page)
        assert server.get("/v1/models", origin=page).headers["access-control-allow-origin"] == page
        assert server.get("/v1/models", origin="https://other.example.com").status == 403
