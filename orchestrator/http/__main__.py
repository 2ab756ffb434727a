"""`python -m mgpu.orchestrator.http`: the HTTP process. Its spec comes on standard input, which stays open."""

import asyncio
import contextlib
import logging
import os
import resource
import select
import signal
import socket
import sys

from mgpu.orchestrator.host.listening import remove_file
from mgpu.orchestrator.http.server import new_event_loop, serve
from mgpu.protocol.internal.child import BadSpec, end_with_parent, read_spec
from mgpu.protocol.internal.http_spec import HTTP_SPEC, READY, HttpSpec

_PARENT_DEATH_S = 0.5
"""The death signal comes when the parent's first thread has ended, shortly before the parent itself has."""
_MANY_FILES = 1 << 16


def main() -> int:
    """Run until the parent closes standard input or SIGTERM comes. 1 after a failure, once the parent knows it."""
    logging.basicConfig(level=logging.INFO, format="http: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal group; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parent_fds = [sys.stdin.fileno(), os.pidfd_open(os.getppid())]
    _allow_many_connections()
    try:
        spec = read_spec(HTTP_SPEC, HttpSpec)
    except BadSpec as error:
        sys.exit(f"http: {error}")
    try:
        end_with_parent(signal.SIGTERM)  # in case something else keeps its end of our standard input open
        _serve(spec, parent_fds)
    except SystemExit:  # SIGTERM
        raise
    except BaseException as error:  # the edge of the process: the parent is told why it ends
        logging.getLogger(__name__).error("the HTTP process ends", exc_info=error)
        _report(spec.report_fd, str(error).encode() or type(error).__name__.encode())
        return 1
    finally:
        if spec.unix_path and select.select(parent_fds[1:], [], [], _PARENT_DEATH_S)[0]:  # the parent cannot clean up
            remove_file(spec.unix_path)
    return 0


def _serve(spec: HttpSpec, parent_fds: list[int]) -> None:
    listener = socket.socket(fileno=spec.listen_fd)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(listener, spec.endpoint, spec.model_name, parent_fds, lambda: _report(spec.report_fd, READY)))


def _report(fd: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # it has been said already, or the parent is gone
        os.write(fd, text)
        os.close(fd)


def _allow_many_connections() -> None:
    """Use all file descriptors that the system allows: each connection takes one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


if __name__ == "__main__":
    sys.exit(main())
