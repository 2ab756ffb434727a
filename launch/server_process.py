"""Run ``mgpu-launch serve`` as a child process, for the demo, benchmarks and tests; this is not the server itself."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.signals import end_at_once
from mgpu.protocol.discovery import BASE_VARIABLE, running_servers
from mgpu.protocol.internal.process.child import end_with_parent

STOP_S = 45.0


class ServerDied(Exception):
    """The server ended, or was not ready in time. ``output`` is its log, if that was captured."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(f"{message}\n{output}" if output else message)
        self.output = output


class ServerProcess:
    """A server in a process group of its own, with a private runtime directory.

    It ends with the thread that made it, even one that is killed.
    """

    def __init__(
        self, *arguments: str, log: Path | None = None, environ: Mapping[str, str] | None = None, quiet: bool = True
    ) -> None:
        """Start ``mgpu-launch serve`` with ``arguments``; its log goes to ``log``, else nowhere or to the screen.

        It has no HTTP unless ``arguments`` say ``--http``: many may run side by side.
        """
        try:
            self._base = tempfile.TemporaryDirectory(prefix="mgpu-")
        except OSError as error:
            raise UserError(
                f"no folder for temporary files can be written to: {error}. Set TMPDIR=/path/to/a/writable/folder"
            ) from error
        self.environ = {**os.environ, **(environ or {}), BASE_VARIABLE: self._base.name}
        http = () if any(each.split("=")[0] == "--http" for each in arguments) else ("--http", "none")
        self._log_path = log or Path(self._base.name) / "log"
        self._log = self._log_path.open("w") if quiet else None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mgpu.launch.cli", "serve", *arguments, *http],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )

    @property
    def runtime_base(self) -> Path:
        """The folder that holds the server's runtime directory."""
        return Path(self._base.name)

    def http_url(self) -> str:
        """Return where a ready server's HTTP is; empty if it has none."""
        return running_servers(self.environ)[0].http

    def output(self) -> str:
        """Return what the server has logged."""
        return self._log_path.read_text(errors="replace") if self._log else ""

    def wait_ready(self, timeout_s: float = 300.0) -> str:
        """Wait for the server and return its endpoint. ServerDied when it ends first, or after ``timeout_s``."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if servers := running_servers(self.environ):
                return servers[0].endpoint
            try:
                status = self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline_s:
                    raise ServerDied(f"the server was not ready after {timeout_s:g} s", self.output()) from None
            else:
                raise ServerDied(f"the server ended with status {status} before it was ready", self.output())

    def stop(self) -> int:
        """End the server by SIGTERM and return its exit status: minus the signal, if that ended it."""
        self.process.terminate()
        return self.process.wait(STOP_S)

    def close(self) -> None:
        """Stop the server if it still runs, by force if need be, and remove its files."""
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        finally:
            self.process.kill()
            self.process.wait(STOP_S)
            if self._log:
                self._log.close()
            self._base.cleanup()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Make SIGTERM and SIGHUP leave the block as Ctrl-C does, so that servers in it stop and their files are removed.

    SystemExit with the status that a shell would give to the signal. Call it from the main thread.
    """

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    numbers = [number for number in previous if previous[number] in (signal.SIG_DFL, end_at_once)]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, previous[number])


@contextlib.contextmanager
def running_server(*arguments: str) -> Iterator[str]:
    """Yield the endpoint of a server that runs inside the block."""
    with ServerProcess(*arguments) as server:
        yield server.wait_ready()
