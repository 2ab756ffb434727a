"""Run the HTTP process alone, as the orchestrator does, before whatever front channel a test has."""

import contextlib
import os
import select
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from harness.servers.http_client import Answer, get, post
from mgpu.orchestrator.host.listening import HttpAddress, listening
from mgpu.orchestrator.processes.child_process import ChildProcess
from mgpu.protocol.internal.http_spec import HTTP_LINK, READY, ApiKey, HttpOptions, HttpSpec, NewApiKeys

START_S = 60.0


class HttpServer:
    """`python -m mgpu.orchestrator.http` on a free port. A context manager."""

    def __init__(
        self, endpoint: str, *, is_loopback_port: bool = True, front_keys: Sequence[bytes] = (), **options: Any
    ) -> None:
        self._closing = contextlib.ExitStack()
        listener = self._closing.enter_context(listening(HttpAddress("127.0.0.1", 0, "")))
        assert listener is not None
        self.url = listener.url
        report_fd, report_to = os.pipe()
        listen_fd = listener.socket.fileno()
        spec = HttpSpec(listen_fd, report_to, endpoint, list(front_keys), HttpOptions(**options), "", is_loopback_port)
        command = (sys.executable, "-m", "mgpu.orchestrator.http")
        self.process = ChildProcess("http", command, HTTP_LINK.encode(spec), os.environ, (listen_fd, report_to))
        self._closing.callback(self.process.kill)
        os.close(report_to)
        assert select.select([report_fd], [], [], START_S)[0]
        report = os.read(report_fd, 4096)
        os.close(report_fd)
        assert report == READY, report

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **headers: str) -> Answer:
        return get(self.url, path, **{name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, body: object, **headers: str) -> Answer:
        return post(self.url, path, body, **{name.replace("_", "-"): value for name, value in headers.items()})

    def tell(self, api_keys: list[ApiKey]) -> None:
        """Send other API keys, as after SIGHUP."""
        self.process.tell(HTTP_LINK.encode(NewApiKeys(api_keys)))

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
