"""The HTTP application: which path leads to which route, and what becomes of errors."""

import logging
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mgpu.orchestrator.http.edge.errors import CLIENT_CLOSED_STATUS, HttpError, error_of
from mgpu.orchestrator.http.edge.guard import PAGE_PREFIX, ApiKeys, Guard
from mgpu.orchestrator.http.edge.hosts import Hosts
from mgpu.orchestrator.http.edge.unknown_path import unknown_path
from mgpu.orchestrator.http.requests.anthropic_rules import PROMPT_RULES
from mgpu.orchestrator.http.requests.anthropic_rules import RULES as MESSAGE_RULES
from mgpu.orchestrator.http.requests.response_rules import RULES as RESPONSE_RULES
from mgpu.orchestrator.http.routes.call import Call, Handler, Served
from mgpu.orchestrator.http.routes.chat import RULES as CHAT_RULES
from mgpu.orchestrator.http.routes.chat import chat_completions
from mgpu.orchestrator.http.routes.completions import RULES as COMPLETION_RULES
from mgpu.orchestrator.http.routes.completions import completions
from mgpu.orchestrator.http.routes.health import live, ready, version
from mgpu.orchestrator.http.routes.messages import count_tokens, messages
from mgpu.orchestrator.http.routes.metrics import metrics
from mgpu.orchestrator.http.routes.models import model, models
from mgpu.orchestrator.http.routes.openapi import Path, openapi
from mgpu.orchestrator.http.routes.page import page
from mgpu.orchestrator.http.routes.responses import responses
from mgpu.orchestrator.http.routes.status import status
from mgpu.orchestrator.http.routes.text import (
    DETOKENIZE_RULES,
    TEMPLATE_RULES,
    TOKENIZE_RULES,
    apply_template,
    detokenize,
    tokenize,
)
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.internal.process.bounded_log import BoundedLog

log = logging.getLogger(__name__)
_BROKEN_OFF, _NOT_ANSWERED = BoundedLog(log, logging.ERROR), BoundedLog(log, logging.ERROR)

_PATHS = (
    Path("POST", "/v1/chat/completions", chat_completions, CHAT_RULES, ("messages",), streams=True),
    Path("POST", "/v1/completions", completions, COMPLETION_RULES, ("prompt",), streams=True),
    Path("POST", "/v1/responses", responses, RESPONSE_RULES, ("input",), streams=True),
    Path("POST", "/v1/messages", messages, MESSAGE_RULES, ("messages", "max_tokens"), streams=True),
    Path("POST", "/v1/messages/count_tokens", count_tokens, PROMPT_RULES, ("messages",)),
    Path("GET", "/v1/models", models),
    Path("GET", "/v1/models/{name:path}", model),
    Path("POST", "/tokenize", tokenize, TOKENIZE_RULES),
    Path("POST", "/detokenize", detokenize, DETOKENIZE_RULES, ("tokens",)),
    Path("POST", "/apply-template", apply_template, TEMPLATE_RULES, ("messages",)),
    Path("GET", "/health", ready),
    Path("GET", "/health/ready", ready),
    Path("GET", "/health/live", live),
    Path("GET", "/metrics", metrics, media="text/plain"),
    Path("GET", "/status", status),
    Path("GET", "/version", version),
)
_PAGE = (Path("GET", "/", page), Path("GET", f"{PAGE_PREFIX}{{name}}", page))
"""For people: not in the document of the API."""
PATHS = (*_PATHS, openapi(_PATHS), *_PAGE)


def make_app(served: Served, api_keys: ApiKeys, cors: Sequence[str], hosts: Hosts) -> ASGIApp:
    """Build the application; see `Guard` about who may use it."""
    routes = [Route(each.path, _Endpoint(each.handler, served), methods=[each.method]) for each in PATHS]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _on_http_exception})
    app.router.redirect_slashes = False
    guarded: ASGIApp = Guard(app, api_keys, cors, hosts)
    if cors:  # outermost: a browser asks first, without a key
        guarded = CORSMiddleware(
            guarded, cors, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=["*"], max_age=600
        )
    return guarded


class _Endpoint:
    """Runs a handler for a request, and turns its errors into answers. An ASGI application."""

    def __init__(self, handler: Handler, served: Served) -> None:
        self._handler = handler
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(Request(scope, receive, send), self._served)
        response = await self._response(call)
        try:
            await response(scope, receive, send)
        except Exception as error:  # our own bug, after the answer has begun: its connection is closed
            _BROKEN_OFF.write("an answer of %s broke off", scope["path"], error=error)

    async def _response(self, call: Call) -> ASGIApp:
        path = call.request.url.path
        try:
            return await self._handler(call)
        except HttpError as error:
            return error.response(path, call.headers)
        except MgpuError as error:
            return error_of(error).response(path, call.headers)
        except ClientDisconnect:
            return HttpError(CLIENT_CLOSED_STATUS, "the client closed the connection").response(path)
        except Exception as error:  # the border to clients: our own bug costs one request, not the server
            _NOT_ANSWERED.write("%s could not be answered", path, error=error)
            return HttpError(500, "internal error", "server_error", "internal_error").response(path, call.headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        found = HttpError(405, f"{request.method} is not for this path; use {allowed}", code="method_not_allowed")
        found.headers["allow"] = allowed
    else:
        text = unknown_path(request.url.path, (each.path for each in PATHS))
        found = HttpError(error.status_code, text, code="not_found")
    return found.response(request.url.path)
