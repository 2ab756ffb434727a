"""GET /openapi.json: the paths, from the same rules that check their bodies."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from mgpu import __version__
from mgpu.orchestrator.http.requests.schemas import body_schema
from mgpu.orchestrator.http.routes.call import Call, Handler
from mgpu.protocol.front.fields import Rule

_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}},
    "required": ["error"],
}
_STATUSES = (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504)


@dataclass(frozen=True, slots=True)
class Path:
    """A path of the server and what answers it. The handler's docstring says what it does."""

    method: str
    path: str
    handler: Handler
    rules: dict[str, Rule] | None = None
    required: tuple[str, ...] = ()
    streams: bool = False
    """``stream: true`` makes the answer server-sent events."""
    media: str = "application/json"
    """Type of the answer."""


def openapi(paths: Sequence[Path]) -> Path:
    """Return the path of the document that describes ``paths``."""
    document = {
        "openapi": "3.1.0",
        "info": {"title": "mgpu", "version": __version__},
        "paths": _described(paths),
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }
    return Path("GET", "/openapi.json", partial(_answer, document))


async def _answer(document: dict[str, Any], call: Call) -> ASGIApp:
    return call.json(document)


def _described(paths: Sequence[Path]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for each in paths:
        described.setdefault(each.path.replace(":path", ""), {})[each.method.lower()] = _operation(each)
    return described


def _operation(path: Path) -> dict[str, Any]:
    kind = "object" if path.media == "application/json" else "string"
    content: dict[str, Any] = {path.media: {"schema": {"type": kind}}}
    if path.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    failed = {"description": "an error", "content": {"application/json": {"schema": _ERROR}}}
    operation: dict[str, Any] = {
        "summary": (path.handler.__doc__ or "").strip().partition("\n")[0],
        "responses": {"200": {"description": "the answer", "content": content}}
        | {str(status): failed for status in _STATUSES},
    }
    if "{name" in path.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        operation["parameters"] = [name]
    if path.rules is not None:
        schema = body_schema(path.rules, path.required)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
