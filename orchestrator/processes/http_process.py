"""The HTTP process: start it, notice its end, replace it. Its listening socket outlives it, so nobody is refused."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Container
from dataclasses import replace

from mgpu.orchestrator.config import HTTP_COMMAND
from mgpu.orchestrator.host.listening import HttpListener
from mgpu.orchestrator.processes.child_process import ChildProcess, ProcessStartError, describe_exit
from mgpu.orchestrator.processes.failures import HttpLost, RestartPause
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.internal.http_spec import HTTP_LINK, READY, ApiKey, HttpOptions, HttpSpec, NewApiKeys
from mgpu.protocol.keys import public_of

log = logging.getLogger(__name__)

_REPORT_BYTES = 4096
STOP_S = 2.0
"""Time that the process gets to send the last words of its streams."""


class HttpProcess:
    """The HTTP server's process; none while ``listener`` is None, and until `start_if_due` knows the front channel.

    Use it as a context manager; leaving it kills the process.
    """

    def __init__(
        self,
        listener: HttpListener | None,
        options: HttpOptions,
        front_keys: list[bytes],
        command: tuple[str, ...] = HTTP_COMMAND,
    ) -> None:
        """``front_keys`` are those of `HttpSpec`: see `front_keys_of`."""
        self.is_ready = listener is None
        """Nothing has to be waited for: it accepts connections, or there is no HTTP."""
        self.restarts = 0
        self._listener = listener
        self._options = options
        self._front_keys = front_keys
        self._command = command
        self._pause = RestartPause()
        self._start_at_s = math.inf if listener is None else 0.0
        """When the next process is to be started; infinity while there is one."""
        self._process: ChildProcess | None = None
        self._report_fd = -1
        self._was_ready = False

    def __enter__(self) -> "HttpProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    @property
    def url(self) -> str:
        """Where clients connect; empty if there is no HTTP."""
        return "" if self._listener is None else self._listener.url

    @property
    def fds(self) -> list[int]:
        """The descriptors to watch: the end of the process, and its report until that has come."""
        fds = [] if self._process is None else [self._process.pidfd]
        return fds if self._report_fd < 0 else [*fds, self._report_fd]

    def pause_left_s(self) -> float:
        """Return how long the next process still has to wait; infinity while there is one."""
        return max(0.0, self._start_at_s - time.monotonic())

    def start_if_due(self, endpoint: str) -> bool:
        """Start the next process if its pause is over and the front channel has its ``endpoint``; return whether."""
        if self._listener is None or not endpoint or self.pause_left_s() > 0.0:
            return False
        self._start_at_s = math.inf
        self._start(self._listener, endpoint)
        return True

    def _start(self, listener: HttpListener, endpoint: str) -> None:
        self._report_fd, report_to = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        listen_fd = listener.socket.fileno()
        spec = HttpSpec(
            listen_fd=listen_fd,
            report_fd=report_to,
            endpoint=endpoint,
            front_keys=self._front_keys,
            options=self._options,
            unix_path=listener.address.path,
            is_loopback_port=listener.address.is_loopback_port,
        )
        try:
            self._process = ChildProcess(
                "http", self._command, HTTP_LINK.encode(spec), os.environ, (listen_fd, report_to)
            )
        except ProcessStartError as error:
            self._close_report()
            raise HttpLost(str(error)) from error
        finally:
            os.close(report_to)

    def notice(self, events: Container[object]) -> bool:
        """Read what the process reports; return whether it has become ready. HttpLost when it has ended."""
        if self._report_fd in events:
            report = os.read(self._report_fd, _REPORT_BYTES)
            self._close_report()
            if report == READY:
                self.is_ready = self._was_ready = True
                return True
            if report:
                raise HttpLost(report.decode(errors="replace").strip())
        if self._process is not None and self._process.pidfd in events:
            status = self._process.exit_status()
            if status is not None:
                raise HttpLost(f"the process {describe_exit(status)}")
        return False

    def replace(self, failure: HttpLost) -> None:
        """End what is left of the process; the next one has to wait: call `start_if_due`.

        Input may have ended it, so no number of replacements ends the server. The first process must have been ready.
        """
        if not self._was_ready:
            raise failure
        log.error("%s", failure.report)
        self._kill()
        self.is_ready = False
        self.restarts += 1
        pause_s = self._pause.next_s()
        log.warning("restart %d of the HTTP process%s", self.restarts, f" in {pause_s:g} s" if pause_s else "")
        self._start_at_s = time.monotonic() + pause_s

    def reload(self, api_keys: list[ApiKey] | None) -> None:
        """Let this process, and those that replace it, use other API keys."""
        self._options = replace(self._options, api_keys=api_keys)
        if self._process is not None:
            self._process.tell(HTTP_LINK.encode(NewApiKeys(api_keys)))

    def stop(self) -> None:
        """Let the process end its streams, whose last words have come from the gateway, and leave.

        The file of a unix socket goes first. So the process, which would remove it for a parent that was killed, need
        not find out whether this one was.
        """
        if self._listener is not None:
            self._listener.remove_file()
        if self._process is not None:
            self._process.close_stdin()
            self._process.wait(time.monotonic() + STOP_S)
        self._kill()

    def _kill(self) -> None:
        self._close_report()
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _close_report(self) -> None:
        if self._report_fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._report_fd)
            self._report_fd = -1


def front_keys_of(keys: ServerKeys | None, own_pair: tuple[bytes, bytes] | None) -> list[bytes]:
    """Return the keys with which the process connects to a front channel that has ``keys``; none if it needs none."""
    if keys is None or own_pair is None:
        return []
    public, secret = own_pair
    return [secret, public, public_of(keys.secret)]
