"""`python -m mgpu.orchestrator.gateway`: the gateway process. Its spec comes on standard input, which stays open."""

import faulthandler
import logging
import os
import resource
import select
import shutil
import signal
import sys
import traceback

import zmq

from mgpu.orchestrator.gateway.front.endpoint import BindError
from mgpu.orchestrator.gateway.front.socket import Front
from mgpu.orchestrator.gateway.gateway import Gateway, codec_of
from mgpu.orchestrator.gateway.memory_limit import MemoryFull, be_first_to_go
from mgpu.orchestrator.gateway.text.background import Jobs
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.protocol.internal.child import BadSpec, end_with_parent, read_spec
from mgpu.protocol.internal.gateway_messages import LINK, GatewayFailure, GatewaySpec

_PARENT_DEATH_S = 0.5
"""The death signal comes when the parent's first thread is gone, somewhat before the parent itself is."""
_MANY_FILES = 1 << 16
LINK_LINGER_MS = 1000


def main() -> int:
    """Run until the parent closes standard input or SIGTERM comes; 1 after a failure, which the parent is told."""
    logging.basicConfig(level=logging.INFO, format="gateway: %(message)s", stream=sys.stderr)
    faulthandler.register(signal.SIGUSR1)  # the parent asks where a gateway that hangs is before it kills it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal group; the parent decides
    parent_fds = [sys.stdin.fileno(), os.pidfd_open(os.getppid())]
    _allow_many_connections()
    be_first_to_go()
    # Nothing may end this process from here on without a clean-up; a parent that is gone by now is seen in `run`.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        spec = read_spec(LINK, GatewaySpec)
    except BadSpec as error:
        sys.exit(f"gateway: {error}")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = context.socket(zmq.DEALER)
    link.setsockopt(zmq.LINGER, LINK_LINGER_MS)
    link.setsockopt(zmq.SNDHWM, 0)
    link.setsockopt(zmq.RCVHWM, 0)
    link.connect(spec.link)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # until the gateway can stop in good order
        end_with_parent(signal.SIGTERM)  # in case something else keeps its end of our standard input open
        _serve(spec, context, link, parent_fds)
    except (BindError, TokenizerError) as error:  # the user can mend it; where it was noticed would only distract
        is_mistake = isinstance(error, TokenizerError)  # while what keeps an endpoint busy may end by itself
        link.send(LINK.encode(GatewayFailure(str(error), "", is_mistake=is_mistake)))
        return 1
    except MemoryFull as error:  # clients are not told that the server has stopped: they resume
        link.send(LINK.encode(GatewayFailure(str(error), "", caused_by_clients=True)))
        return 1
    except Exception as error:  # the process edge: whatever happened, the parent is told why
        link.send(LINK.encode(GatewayFailure(str(error) or type(error).__name__, traceback.format_exc())))
        return 1
    finally:
        context.destroy()  # all sockets: after an exception the front channel is still open
        if select.select(parent_fds, [], [], _PARENT_DEATH_S)[0]:  # nobody else is left to clean up
            shutil.rmtree(spec.runtime_dir, ignore_errors=True)
    return 0


def _serve(
    spec: GatewaySpec, context: "zmq.Context[zmq.Socket[bytes]]", link: "zmq.Socket[bytes]", parent_fds: list[int]
) -> None:
    # A gateway that replaces another is connected to at once, so it must be able to serve at once.
    codec = None if spec.info is None else codec_of(spec)
    front = Front(context, spec.bind, spec.max_request_bytes, spec.keys)
    jobs = Jobs()
    gateway = Gateway(spec, link, front, jobs, parent_fds)
    if spec.info is not None:
        gateway.use(codec)
    # Python runs a handler only between two of its own steps; a signal just before the loop starts to wait would be
    # noticed at the next message. The descriptor is written by the C handler and ends the wait.
    signal.set_wakeup_fd(jobs.wake_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: gateway.stop())
    gateway.run()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we are leaving; the kernel sends one for each thread of the parent


def _allow_many_connections() -> None:
    """Use all file descriptors that the system allows.

    libzmq (4.3.5, ipc_listener.cpp) aborts the process when accepting a connection fails with EMFILE, so the soft limit
    of usually 1024 must not be what a few hundred clients run into.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


if __name__ == "__main__":
    sys.exit(main())
