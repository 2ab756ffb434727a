"""`python -m mgpu.orchestrator.http`: the HTTP process. Its spec comes on standard input, which stays open."""

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

from mgpu.orchestrator.host.listening import remove_file
from mgpu.orchestrator.http.edge.guard import ApiKeys
from mgpu.orchestrator.http.server import allow_many_connections, front_client, new_event_loop, serve
from mgpu.protocol.internal.http_spec import HTTP_LINK, READY, HttpSpec, NewApiKeys
from mgpu.protocol.internal.process.child import BadSpec, end_with_parent, read_spec
from mgpu.protocol.internal.process.logs import configure_logging
from mgpu.protocol.keys import ClientKeys

OOM_SCORE = "600"
NICENESS = 5
"""Workers, engine and gateway come first on a contended core: it serves connections that nobody has vouched for."""
_PARENT_DEATH_S = 10.0
"""The death signal comes when the parent's first thread has ended. On a busy machine the others take seconds. A parent
that lives has removed the file of its socket before it ends this process."""
_POLL_S = 0.05

log = logging.getLogger(__name__)


def main() -> int:
    """Run until the parent closes standard input or SIGTERM comes. 1 after a failure, once the parent knows it."""
    configure_logging("http")
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal group; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parent_fd = os.pidfd_open(os.getppid())
    allow_many_connections()
    os.nice(NICENESS)
    with contextlib.suppress(OSError):  # if memory runs out, the kernel ends this process before the others
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    try:
        spec = read_spec(HTTP_LINK, HttpSpec)
    except BadSpec as error:
        sys.exit(f"http: {error}")
    try:
        end_with_parent(signal.SIGTERM)  # in case something else keeps its end of our standard input open
        _serve(spec, parent_fd)
    except SystemExit:  # SIGTERM
        raise
    except BaseException as error:  # the edge of the process: the parent is told why it ends
        log.error("the HTTP process ends", exc_info=error)
        _report(spec.report_fd, str(error).encode() or type(error).__name__.encode())
        return 1
    finally:
        _clean_up_for(parent_fd, spec.unix_path)
    return 0


def _clean_up_for(parent_fd: int, unix_path: str) -> None:
    """Remove the file of a unix socket if the parent is gone and cannot."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the death signal, after the end of the input, must not end this
    until_s = time.monotonic() + _PARENT_DEATH_S
    while unix_path and os.path.exists(unix_path) and time.monotonic() < until_s:
        if select.select([parent_fd], [], [], _POLL_S)[0]:
            remove_file(unix_path)


def _serve(spec: HttpSpec, parent_fd: int) -> None:
    api_keys = ApiKeys(spec.options.api_keys)
    watched = {sys.stdin.fileno(): lambda: _read_input(api_keys), parent_fd: lambda: True}
    client = front_client(spec.endpoint, ClientKeys(*spec.front_keys) if spec.front_keys else None)
    listener = socket.socket(fileno=spec.listen_fd)

    def report() -> None:
        _report(spec.report_fd, READY)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(listener, client, spec.options, spec.is_loopback_port, api_keys, watched, report))


def _read_input(api_keys: ApiKeys) -> bool:
    """Take other API keys from the parent; return True at the end of the input."""
    try:
        api_keys.keys = read_spec(HTTP_LINK, NewApiKeys).api_keys
    except BadSpec:
        return True
    return False


def _report(fd: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # it has been said already, or the parent is gone
        os.write(fd, text)
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
