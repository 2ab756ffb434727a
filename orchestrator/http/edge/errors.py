"""Errors as HTTP clients see them: a status and OpenAI's form. No internal address and no traceback is in a text."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from starlette.responses import Response

from mgpu.protocol.errors import DeadlineExceeded, MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.front.client_messages import Generate

CLIENT_CLOSED_STATUS = 499
"""The client has gone before its answer. Nobody reads it; it is for logs."""
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_UNREACHABLE = "the server is not reachable just now; it is starting, recovering or stopping"
_RETRY_S = 1.0

_OF_CODE: dict[str, tuple[int, str, str]] = {
    "bad_request": (400, "invalid_request_error", "invalid_value"),
    "bad_version": (500, "server_error", "internal_error"),
    "duplicate_id": (409, "conflict_error", "duplicate_id"),
    "unknown_model": (404, "invalid_request_error", "model_not_found"),
    "unknown_request": (500, "server_error", "internal_error"),
    "not_allowed": (403, "permission_error", "not_allowed"),
    "not_ready": (503, "service_unavailable_error", "not_ready"),
    "draining": (503, "service_unavailable_error", "draining"),
    "overloaded": (429, "rate_limit_error", "overloaded"),
    "slow_reader": (503, "service_unavailable_error", "slow_reader"),
    "deadline_exceeded": (504, "timeout_error", "deadline_exceeded"),
    "engine_error": (500, "server_error", "engine_error"),
    "stopped": (503, "service_unavailable_error", "stopped"),
}
"""Status, type and code of a failure on the front channel."""
_FIELDS = frozenset(each.name for each in fields(Generate))
_FIRST_NAME = re.compile(r"([a-z]+(?:_[a-z]+)*)(?=[\[.: ])")
_TOO_LONG = re.compile(r" holds \d+(; use max_tokens |: at most )")
"""What context or KV cache hold, and what a shorter request may have."""
_RETRIED = frozenset({"not_ready", "draining", "overloaded", "slow_reader", "stopped"})


@dataclass(eq=False)
class HttpError(Exception):
    """An answer other than success."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, object]:
        """Return OpenAI's form of the error."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, dict[str, object] | str]:
        """Return Anthropic's form of the error."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def json(self, path: str = "") -> bytes:
        """Return the form that clients of ``path`` expect."""
        body = self.anthropic_body() if path.startswith(ANTHROPIC_PATH) else self.body()
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")

    def response(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        return Response(self.json(path), self.status, {**(headers or {}), **self.headers}, "application/json")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> HttpError:
    return HttpError(400, message, "invalid_request_error", code, param)


def error_of(error: MgpuError) -> HttpError:
    """Return the HTTP error for one of the front channel's clients."""
    if isinstance(error, DeadlineExceeded):
        return HttpError(504, str(error), "timeout_error", "deadline_exceeded")
    if isinstance(error, RequestFailed):
        return _of_failure(error)
    if isinstance(error, ServerUnreachable):  # its text has the endpoint
        return _with_retry(HttpError(503, _UNREACHABLE, "service_unavailable_error", "unreachable"), _RETRY_S)
    return HttpError(500, "internal error", "server_error", "internal_error")


def _of_failure(error: RequestFailed) -> HttpError:
    status, kind, code = _OF_CODE.get(error.code, (500, "server_error", error.code))
    text = str(error)
    if error.code == "bad_request" and text.startswith("the request has ") and "the limit is" in text:
        return HttpError(413, text, kind, "request_too_large")
    if error.code == "bad_request" and text.startswith("the chat template refuses "):
        return HttpError(422, text, kind, "template_refused", "messages")  # right in form, but not for this model
    if error.code == "bad_request" and _TOO_LONG.search(text):
        code = "context_length_exceeded"
    found = HttpError(status, text, kind, code, _param_of(error.code, text))
    return _with_retry(found, error.retry_after_s or _RETRY_S) if error.code in _RETRIED else found


def _param_of(code: str, text: str) -> str | None:
    """Return the field that a refusal of the front channel begins with, such as `logit_bias has token id 9`."""
    if code == "unknown_model":
        return "model"
    name = _FIRST_NAME.match(text) if code == "bad_request" else None
    return name[1] if name and name[1] in _FIELDS else None


def _with_retry(error: HttpError, seconds: float) -> HttpError:
    error.headers["retry-after"] = str(math.ceil(seconds))
    error.headers["retry-after-ms"] = str(round(seconds * 1000))  # openai's clients read it
    return error
