"""What every request passes first: a request id, the check of browsers, that of API keys, and its turn of the loop."""

import contextlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mgpu.orchestrator.http.edge.errors import ANTHROPIC_PATH, HttpError
from mgpu.orchestrator.http.edge.front_window import WHOSE, Whose
from mgpu.orchestrator.http.edge.hosts import Hosts
from mgpu.orchestrator.http.edge.loop_turns import LoopTurns, TurnPath, metered
from mgpu.protocol.internal.http_spec import ApiKey

PAGE_PREFIX = "/page/"
_OPEN_PATHS = frozenset({"/health", "/health/ready", "/health/live", "/"})
"""Load balancers and orchestrators ask without a key. So do browsers for the page, which then asks its user for one."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ApiKeys:
    """The keys that are accepted now."""

    def __init__(self, keys: Sequence[ApiKey] | None) -> None:
        """None: no key is asked for."""
        self.keys = keys

    def name_of(self, presented: Iterable[str]) -> str | None:
        """Return whose key is presented. All keys are compared, each in constant time: the time tells nothing."""
        found = None
        for text in presented:
            digest = sha256(text.encode("utf-8", "surrogateescape")).digest()
            for key in self.keys or ():
                if hmac.compare_digest(digest, key.digest):
                    found = key.name
        return found


class Guard:
    """Lets requests through that may use the server. An ASGI application around another."""

    def __init__(self, app: ASGIApp, api_keys: ApiKeys, cors: Sequence[str], hosts: Hosts) -> None:
        self._app = app
        self._api_keys = api_keys
        self._cors = frozenset(cors)
        self._hosts = hosts
        self._turns = LoopTurns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else f"req-{secrets.token_hex(12)}"
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        is_anthropic = scope["path"].startswith(ANTHROPIC_PATH)
        names = (b"x-request-id", b"request-id") if is_anthropic else (b"x-request-id",)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name, request_id.encode()) for name in names)]
            await send(message)

        path = connection = _address_of(scope)
        refusal = self._refusal(scope, headers, request_id)
        if refusal is None and scope["state"]["has_key"]:
            path = (f"key {scope['state']['account']}", "")
        left = scope.get("left")
        try:
            await self._turns.begin(path, left)
        except ClientDisconnect:
            return
        if refusal is not None:
            await refusal.response(scope["path"])(scope, receive, send_with_id)
            return
        WHOSE.set(Whose((path[0], " ".join(connection))))
        scope["state"]["wait_turn"] = partial(self._turns.wait, path, left)
        scope["state"]["charge_front"] = partial(self._turns.charge_front, path[0])
        await metered(self._app(scope, receive, send_with_id), partial(self._turns.charge, path[0]))

    def _refusal(self, scope: Scope, headers: Headers, request_id: str) -> HttpError | None:
        """Return why this request is not served, or note whose it is."""
        try:
            self._hosts.check(headers.getlist("host"), self._api_keys.keys is not None)
            self._check_origin(headers)
            scope["state"]["account"], scope["state"]["has_key"] = self._account(scope, headers, request_id)
        except HttpError as error:
            return error
        return None

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites: a browser on this machine can reach what is closed to the network.

        A page is this server's own if it came from the host that the request names, which has been checked.
        """
        origin = headers.get("origin")
        if origin is None or origin in self._cors or "*" in self._cors:
            return
        if _netloc(origin) != headers.get("host", ""):
            raise HttpError(
                403, f"pages of {origin[:100]!a} may not use this server; --http-cors {origin[:100]!a} lets them",
                "permission_error", "origin_not_allowed",
            )  # fmt: skip

    def _account(self, scope: Scope, headers: Headers, request_id: str) -> tuple[str, bool]:
        """Return whose request this is and whether a key says so. HttpError 401 if a key is lacking or wrong."""
        is_open = scope["path"] in _OPEN_PATHS or scope["path"].startswith(PAGE_PREFIX)
        if self._api_keys.keys is None or is_open:
            client = scope.get("client")
            return f"http {client[0]}/{client[1]}" if client else f"http {request_id[:100]}", False
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = [token.strip()] if scheme.lower() == "bearer" else []
        if "x-api-key" in headers:
            presented.append(headers["x-api-key"])
        name = self._api_keys.name_of(presented)
        if name is None:
            what = "the API key is not known" if presented else "an API key is needed: Authorization: Bearer KEY"
            raise HttpError(
                401, what, "authentication_error", "invalid_api_key", headers={"www-authenticate": "Bearer"}
            )
        return name, True


def _address_of(scope: Scope) -> TurnPath:
    """Return the address of a client and its connection. All clients of a unix socket are one."""
    address, port = scope.get("client") or ("unix", "")
    return f"address {address}", str(port)


def _netloc(origin: str) -> str | None:
    """Return host and port of an origin; None for what is none, such as ``null``."""
    with contextlib.suppress(ValueError):
        return urlsplit(origin).netloc or None
    return None
