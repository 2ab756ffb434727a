"""One HTTP request on its way through a route: its body, the front channel, and the headers of its answer."""

import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from json.encoder import encode_basestring
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.body import read_object
from mgpu.orchestrator.http.requests.fields import Fields, parse_fields
from mgpu.orchestrator.http.routes.field_log import NAME_CHARS, FieldLog
from mgpu.protocol.client.async_client import AsyncClient
from mgpu.protocol.client.requests.request_message import GenerateOptions
from mgpu.protocol.front.fields import Rule

_MOST_NAMES = 20


@dataclass(slots=True)
class Served:
    """What all requests of one HTTP process share."""

    client: AsyncClient
    names_accounts: bool = True
    """Tell the server whose each request is. Refused on a connection with a client's key, which is one account."""
    started_s: int = field(default_factory=lambda: int(time.time()))
    field_log: FieldLog = field(default_factory=FieldLog)


class Call:
    """One request."""

    def __init__(self, request: Request, served: Served) -> None:
        self.request = request
        self.served = served
        self.client = served.client
        self.headers: dict[str, str] = {}
        """Of the answer."""
        self.created = int(time.time())

    def new_id(self, prefix: str) -> str:
        return f"{prefix}-{secrets.token_hex(16)}"

    def options(self, options: GenerateOptions) -> GenerateOptions:
        """Add whose request it is. Clients with keys share no prefixes, so that none learns what others have asked."""
        state = self.request.scope["state"]
        if self.served.names_accounts:
            options["account"] = state["account"]
        if state["has_key"]:
            salted = f"{state['account']} {options.get('cache_salt', '')}"
            options["cache_salt"] = blake2b(salted.encode(), digest_size=32).hexdigest()
        return options

    async def fields(self, rules: Mapping[str, Rule], *required: str) -> Fields:
        """Read and check the body. Fields without effect are named in a header of the answer."""
        fields = parse_fields(await read_object(self.request), rules, *required)
        if fields.ignored:
            self._warn(fields.ignored)
        return fields

    def _warn(self, names: list[str]) -> None:
        shown = ", ".join(ascii(name[:NAME_CHARS])[1:-1].replace('"', "'") for name in names[:_MOST_NAMES])
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        self.headers["warning"] = f'299 mgpu "fields without effect: {shown}{more}"'
        self.served.field_log.note(self.request.url.path, names)

    def json(self, body: Mapping[str, Any], status: int = 200) -> Response:
        """Return an answer in JSON."""
        return Response(to_json(body), status, self.headers, "application/json")


Handler = Callable[[Call], Awaitable[ASGIApp]]


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def to_json(body: object) -> bytes:
    return _ENCODER.encode(body).encode("utf-8", "replace")


def text_json(text: str) -> bytes:
    """Return `to_json` of a text, in a tenth of the time: streams need it for every token."""
    return encode_basestring(text).encode("utf-8", "replace")


def named_event(name: str, body: Mapping[str, Any]) -> bytes:
    """Return a server-sent event that has its name also in its JSON."""
    return f"event: {name}\n".encode() + event({"type": name, **body})


def event(body: object) -> bytes:
    """Return a server-sent event with JSON."""
    return b"data: " + to_json(body) + b"\n\n"
