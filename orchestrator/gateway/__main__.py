"""`python -m mgpu.orchestrator.gateway`: the gateway process. Its spec comes on standard input, which stays open."""

import faulthandler
import os
import select
import shutil
import signal
import sys
import traceback
from pathlib import Path

import zmq

from mgpu.orchestrator.gateway.front.endpoint import BindError
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.gateway.front.transport.open_files import allow_many_connections
from mgpu.orchestrator.gateway.gateway import Gateway
from mgpu.orchestrator.gateway.memory_limit import MemoryFull, prefer_as_oom_victim
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.processes.background import BackgroundTasks
from mgpu.orchestrator.gateway.text.tokenizer import load_codec
from mgpu.orchestrator.host.driver_files import read_records, remove_driver_files
from mgpu.protocol.discovery import COPY_FOLDER, LOCK_NAME, is_locked
from mgpu.protocol.internal.gateway_messages import LINK, GatewayFailure, GatewaySpec
from mgpu.protocol.internal.process.child import BadSpec, end_with_parent, read_spec
from mgpu.protocol.internal.process.logs import configure_logging
from mgpu.protocol.internal.process.work_record import WorkRecord

_PARENT_DEATH_S = 0.5
"""The death signal comes when the parent's first thread has ended, shortly before the parent itself has."""
_WORKERS_DEATH_S = 10.0
"""Longest wait for workers that end with the parent: their GPU memory is freed first."""
LINK_LINGER_MS = 1000


def main() -> int:
    """Run until the parent closes standard input or SIGTERM comes. 1 after a failure, once the parent knows it."""
    configure_logging("gateway")
    _limit_tokenizers()
    faulthandler.register(signal.SIGUSR1)  # the parent asks for the stacks of a gateway that hangs before it kills it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal group; the parent decides
    parent_fds = [sys.stdin.fileno(), os.pidfd_open(os.getppid())]
    allow_many_connections()
    prefer_as_oom_victim()
    # From here on nothing may end this process without a clean-up; `run` notices a parent that is gone by now.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        spec = read_spec(LINK, GatewaySpec)
    except BadSpec as error:
        sys.exit(f"gateway: {error}")
    # Each context has threads of its own: what clients send does not hold up the engine.
    context, own_context = zmq.Context[zmq.Socket[bytes]](), zmq.Context[zmq.Socket[bytes]]()
    link = own_context.socket(zmq.DEALER)
    link.setsockopt(zmq.LINGER, LINK_LINGER_MS)
    link.set_hwm(0)
    link.connect(spec.link)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # until the gateway can stop in good order
        end_with_parent(signal.SIGTERM)  # in case something else keeps its end of our standard input open
        _serve(spec, context, link, parent_fds)
    except SystemExit:  # SIGTERM
        raise
    except BaseException as error:  # the edge of the process: the parent is told why it ends, be it a panic
        link.send(LINK.encode(_failure_of(error)))
        return 1
    finally:
        context.destroy()  # closes all sockets: after an exception the front channel is still open
        own_context.destroy()
        if select.select(parent_fds, [], [], _PARENT_DEATH_S)[0]:  # the parent is gone and cannot clean up
            _remove_folders(Path(spec.runtime_dir))
    return 0


def _remove_folders(own: Path) -> None:
    """Remove the server's folder, and that of the router whose copy it was, if the router has ended too.

    The workers end with the parent. What the driver leaves of them goes when they have.
    """
    workers = read_records(own)
    shutil.rmtree(own, ignore_errors=True)
    of_router = own.parent.parent
    is_copy = own.parent.name.startswith(COPY_FOLDER) and (of_router / LOCK_NAME).is_file()
    if is_copy and not is_locked(of_router):
        shutil.rmtree(of_router, ignore_errors=True)
    remove_driver_files(workers, _WORKERS_DEATH_S)


def _serve(
    spec: GatewaySpec, context: "zmq.Context[zmq.Socket[bytes]]", link: "zmq.Socket[bytes]", parent_fds: list[int]
) -> None:
    # Clients connect at once to a gateway that replaces another, so it binds only when it can serve.
    codec = None if spec.info is None else load_codec(spec.model_path, spec.model_format)
    front = FrontSocket(context, spec.bind, spec.max_request_bytes, spec.keys, spec.own_key)
    WorkRecord(spec.record_fd).note_bound()
    background = BackgroundTasks()
    gateway = Gateway(spec, link, front, background, parent_fds)
    if spec.info is not None:
        gateway.serve_with(codec)
    # Python runs a handler only between two bytecodes: a signal just before the poll would be handled at the next
    # message. The C handler writes to this descriptor at once, which ends the poll.
    signal.set_wakeup_fd(background.wake_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: gateway.stop())
    gateway.run()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the kernel sends one for each thread of the parent


def _failure_of(error: BaseException) -> GatewayFailure:
    if isinstance(error, MemoryFull):  # clients are not told that the server has stopped: they resume
        return GatewayFailure(str(error), "", caused_by_clients=True)
    if isinstance(error, TokenizerError):  # the user can repair it; a traceback would only distract
        return GatewayFailure(str(error), "", is_mistake=True)
    if isinstance(error, BindError):  # no mistake of the files: an endpoint in use may become free by itself
        return GatewayFailure(str(error), "")
    return GatewayFailure(str(error) or type(error).__name__, traceback.format_exc())


def _limit_tokenizers() -> None:
    """Let the tokenizer library start no threads, and write no stack of a panic, whose input clients choose.

    Single texts need no threads of its own, and where the limit of processes is reached, starting them is a panic.
    """
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}


if __name__ == "__main__":
    sys.exit(main())
