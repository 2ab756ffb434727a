"""Run the application on a socket that the parent has opened, until the parent is gone or closes standard input."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from mgpu.orchestrator.http.app import make_app
from mgpu.orchestrator.http.routes.call import Served
from mgpu.protocol.client.async_client import AsyncClient

GRACE_S = 1
"""Time that open streams get at the end. The gateway has told them by then that the server stops."""
KEEP_ALIVE_S = 75
BACKLOG = 2048
REQUEST_TIMEOUT_S = 3600.0
"""The longest answer."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's event loop where it is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def serve(
    listener: socket.socket, endpoint: str, model_name: str, parent_fds: Sequence[int], report: Callable[[], None]
) -> None:
    """Serve until one of ``parent_fds`` is readable. ``report`` is called when connections are accepted."""
    client = AsyncClient(endpoint, REQUEST_TIMEOUT_S, retries=0)  # connects when this is first needed
    server = _Server(_config(make_app(Served(client, model_name))), report)
    loop = asyncio.get_running_loop()
    for fd in parent_fds:
        loop.add_reader(fd, server.stop)
    try:
        await server.serve([listener])
    finally:
        for fd in parent_fds:
            loop.remove_reader(fd)
        await client.close()


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="auto",  # httptools where it is installed, else h11
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


class _Server(uvicorn.Server):
    """Reports when it accepts connections. Signals are the parent's business."""

    def __init__(self, config: uvicorn.Config, report: Callable[[], None]) -> None:
        super().__init__(config)
        self._report = report

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._report()

    def stop(self) -> None:
        """Accept no more connections, let streams end for a moment, and leave."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
