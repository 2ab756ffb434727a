"""Run the application on a socket that the parent has opened, until the parent is gone or closes standard input."""

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from mgpu.orchestrator.http.app import make_app
from mgpu.orchestrator.http.edge.accepting import Acceptor
from mgpu.orchestrator.http.edge.connections import BoundedProtocol
from mgpu.orchestrator.http.edge.front_window import FrontWindow
from mgpu.orchestrator.http.edge.guard import ApiKeys
from mgpu.orchestrator.http.edge.hosts import Hosts
from mgpu.orchestrator.http.edge.tls import TlsHandshake
from mgpu.orchestrator.http.routes.call import Served
from mgpu.protocol.client.async_client import AsyncClient
from mgpu.protocol.client.backlog import UnreadBounds
from mgpu.protocol.internal.http_spec import HttpOptions
from mgpu.protocol.keys import ClientKeys

GRACE_S = 1
"""Time that open streams get at the end. The gateway has told them by then that the server stops."""
KEEP_ALIVE_S = 75
REQUEST_TIMEOUT_S = 3600.0
"""The longest answer."""
OWN_FILES = 64
"""Descriptors that are no connections."""


def front_client(endpoint: str | None, keys: str | ClientKeys | None) -> AsyncClient:
    """Return the client through which all requests go. It connects when this is first needed."""
    return AsyncClient(
        endpoint, REQUEST_TIMEOUT_S, keys=keys, retries=0, unread_bounds=UnreadBounds(), window=FrontWindow()
    )


def allow_many_connections() -> None:
    """Use all file descriptors that the system allows: each connection takes one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = HttpOptions().max_connections + OWN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if hard == resource.RLIM_INFINITY else min(hard, most), hard))


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's event loop where it is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def serve(
    listener: socket.socket,
    client: AsyncClient,
    options: HttpOptions,
    is_loopback_port: bool,
    api_keys: ApiKeys,
    watched: Mapping[int, Callable[[], bool]],
    report: Callable[[], None],
    names_accounts: bool = True,
) -> None:
    """Serve until a descriptor of ``watched`` is readable and its function returns True.

    ``is_loopback_port``: see `HttpSpec`. ``names_accounts``: see `Served`. ``api_keys`` may be changed meanwhile;
    ``report`` is called when connections are accepted.
    """
    hosts = Hosts(options.allowed_hosts, is_loopback_port and "*" not in options.cors)
    app = make_app(Served(client, names_accounts), api_keys, options.cors, hosts)
    server = _Server(_config(app, options), report)
    loop = asyncio.get_running_loop()

    def read(fd: int) -> None:
        if watched[fd]():
            loop.remove_reader(fd)
            server.should_exit = True

    for fd in watched:
        loop.add_reader(fd, read, fd)
    try:
        await server.serve([listener])
    finally:
        for fd in watched:
            loop.remove_reader(fd)
        await client.close()


def _config(app: ASGIApp, options: HttpOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_protocol(options),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        ssl_certfile=options.tls_cert or None,
        ssl_keyfile=options.tls_key or None,
    )


def _protocol(options: HttpOptions) -> type[BoundedProtocol]:
    """Return the protocol of connections, with its bounds."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OWN_FILES
    BoundedProtocol.most_connections = min(options.max_connections, most)
    BoundedProtocol.head_timeout_s = options.head_timeout_s
    return BoundedProtocol


class _Server(uvicorn.Server):
    """Accepts connections as `Acceptor` does, and reports when it does. Signals are the parent's business."""

    def __init__(self, config: uvicorn.Config, report: Callable[[], None]) -> None:
        super().__init__(config)
        self._report = report
        self._acceptors: list[Acceptor] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.config.ssl is not None:
            self._bound_handshakes(self.config.ssl)
        await super().startup([])
        self._acceptors = [Acceptor(each, self._protocol) for each in sockets or ()]
        self._report()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for each in self._acceptors:
            each.close()
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        """Return what serves a new connection, as uvicorn makes it for its own listeners."""
        make: Any = self.config.http_protocol_class
        found: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None
        )
        return found

    def _bound_handshakes(self, context: ssl.SSLContext) -> None:
        """Let connections be accepted without TLS, and begin it where they are counted."""

        def accept(**named: Any) -> TlsHandshake:
            return TlsHandshake(BoundedProtocol(**named), context)

        self.config.ssl, self.config.http_protocol_class = None, accept  # type: ignore[assignment]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
