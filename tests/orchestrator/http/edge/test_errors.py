"""The status and form of each failure, in OpenAI's and in Anthropic's words."""

import asyncio
from typing import Any, cast, get_args

import pytest
from starlette.requests import Request

from mgpu.orchestrator.http.app import _Endpoint
from mgpu.orchestrator.http.edge.errors import error_of
from mgpu.orchestrator.http.requests.answers import unless_disconnected
from mgpu.orchestrator.http.routes.call import Call, Served
from mgpu.protocol.client.async_client import AsyncClient
from mgpu.protocol.errors import DeadlineExceeded, MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.front.server_messages import FailureCode

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
FAILURES: list[tuple[MgpuError, int, str, str]] = [
    (RequestFailed("bad_request", "n must be 1"), 400, "invalid_request_error", "invalid_request_error"),
    (RequestFailed("bad_request", "the context holds 512"), 400, "invalid_request_error", "invalid_request_error"),
    (RequestFailed("bad_request", "the chat template refuses these messages: x"), 422, "invalid_request_error",
     "invalid_request_error"),
    (RequestFailed("bad_request", "the request has 9 bytes, the limit is 5"), 413, "invalid_request_error",
     "request_too_large"),
    (RequestFailed("not_allowed", "x"), 403, "permission_error", "permission_error"),
    (RequestFailed("unknown_model", "x"), 404, "invalid_request_error", "not_found_error"),
    (RequestFailed("duplicate_id", "x"), 409, "conflict_error", "invalid_request_error"),
    (RequestFailed("overloaded", "x"), 429, "rate_limit_error", "rate_limit_error"),
    (RequestFailed("not_ready", "x"), 503, "service_unavailable_error", "overloaded_error"),
    (RequestFailed("draining", "x"), 503, "service_unavailable_error", "overloaded_error"),
    (RequestFailed("slow_reader", "x"), 503, "service_unavailable_error", "overloaded_error"),
    (RequestFailed("stopped", "x"), 503, "service_unavailable_error", "overloaded_error"),
    (RequestFailed("engine_error", "x"), 500, "server_error", "api_error"),
    (RequestFailed("bad_version", "x"), 500, "server_error", "api_error"),
    (RequestFailed("unknown_request", "x"), 500, "server_error", "api_error"),
    (RequestFailed("deadline_exceeded", "x"), 504, "timeout_error", "timeout_error"),
    (DeadlineExceeded("x"), 504, "timeout_error", "timeout_error"),
    (ServerUnreachable("ipc:///secret does not answer"), 503, "service_unavailable_error", "overloaded_error"),
    (MgpuError("a secret"), 500, "server_error", "api_error"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "status", "openai", "anthropic"), FAILURES)
def test_a_failure_has_its_status_and_the_form_of_its_path(
    error: MgpuError, status: int, openai: str, anthropic: str
) -> None:
    found = error_of(error)
    assert found.status == status
    assert found.body()["error"].items() >= {"type": openai, "message": found.message}.items()  # type: ignore[attr-defined]
    assert found.anthropic_body() == {"type": "error", "error": {"type": anthropic, "message": found.message}}
    assert found.response(CHAT).body != found.response(MESSAGES).body
    assert ("retry-after" in found.headers) == (status in (429, 503))
    assert "secret" not in found.message


@pytest.mark.parametrize(
    ("code", "text", "param"),
    [
        ("bad_request", "logit_bias has token id 9; the vocabulary has ids 0 to 8", "logit_bias"),
        ("bad_request", "messages[0].tool_call_id is 'x', but no message before it has it", "messages"),
        ("bad_request", "structured_outputs.json_schema: Unimplemented keys", "structured_outputs"),
        ("bad_request", "the prompt has 9 tokens", None),
        ("bad_request", "32 prompt tokens and max_tokens 9", None),
        ("unknown_model", "model 'x' is not served here", "model"),
        ("engine_error", "model failed", None),
    ],
)
def test_the_field_at_fault_is_named(code: Any, text: str, param: str | None) -> None:
    assert error_of(RequestFailed(code, text)).param == param


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("5 prompt tokens and max_tokens 600 make 605, but the context holds 512; use max_tokens 507 or less",
         "context_length_exceeded"),
        ("the prompt has 600 tokens, but the KV cache holds 512: at most 511 for the prompt and one new token",
         "context_length_exceeded"),
        ("messages[0].name holds a lone surrogate (U+D83D) at character 0", "invalid_value"),
        ("prompt_ids holds -5; token ids are not negative", "invalid_value"),
    ],
)  # fmt: skip
def test_only_what_is_too_long_says_so(text: str, code: str) -> None:
    """Clients shorten their chat then."""
    assert error_of(RequestFailed("bad_request", text)).code == code


def test_every_failure_of_the_front_channel_is_listed_here() -> None:
    assert {error.code for error, *_ in FAILURES if isinstance(error, RequestFailed)} == set(get_args(FailureCode))


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_client_that_has_gone_is_a_499(path: str) -> None:
    sent: list[dict[str, Any]] = []

    async def handler(call: Call) -> Any:
        return await unless_disconnected(call.request, asyncio.Event().wait())

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        assert Request(scope).url.path == path
        await _Endpoint(handler, Served(AsyncClient("ipc:///nowhere")))(scope, receive, send)

    asyncio.run(run())
    assert sent[0]["status"] == 499
    assert b'"the client closed the connection"' in sent[1]["body"]


def test_answers_that_break_off_are_a_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """A client can bring them about, by leaving at the wrong moment or by a bug of ours."""

    async def handler(_call: Call) -> Any:
        async def broken(*_: Any) -> None:
            raise RuntimeError("the handler is closed")

        return broken

    async def many() -> None:
        endpoint = _Endpoint(handler, Served(cast("AsyncClient", None)))
        for _ in range(50):
            await endpoint(
                {"type": "http", "path": CHAT, "method": "GET", "headers": []}, cast("Any", None), cast("Any", None)
            )

    asyncio.run(many())
    assert len(caplog.records) <= 2
