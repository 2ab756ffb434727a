"""Entry of one worker process: ``python -m mgpu.worker``.

The environment is torchrun's: RANK, LOCAL_RANK, WORLD_SIZE, and MASTER_ADDR, MASTER_PORT if the spec names no
rendezvous file. The spec comes on standard input (4 bytes of little-endian length, then the message), which the parent
keeps open.

With ``--join`` this is the process that a launcher such as torchrun starts on another host; it starts the worker itself
(`worker/start/join/agent.py`).

A worker never outlives its parent. It ends when standard input does, and the kernel kills it (PR_SET_PDEATHSIG) when
the parent's thread ends, in case another process keeps standard input open.
"""

import argparse
import faulthandler
import gc
import importlib
import os
import signal
import sys
from threading import Thread

from mgpu.protocol.internal.process.child import BadSpec, end_with_parent, read_spec
from mgpu.protocol.internal.process.logs import configure_logging
from mgpu.protocol.internal.worker_messages import CONTROL, WorkerSpec
from mgpu.worker.start.device import prepare_cuda, start_cuda
from mgpu.worker.start.join.options import add_options

EXIT_FAILED = 1
EXIT_BAD_SPEC = 2
EXIT_PARENT_GONE = 3


def main() -> int:
    """Run one worker. The exit status is 0 after an orderly shutdown."""
    arguments = _parser().parse_args()
    if not arguments.join and (arguments.keys or arguments.model):
        _parser().error("--keys and -m are for a worker that joins a server: --join tcp://HEAD:PORT is missing")
    if arguments.join:
        from mgpu.worker.start.join.command import run_joined

        return run_joined(arguments)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # before it kills a group that failed, the orchestrator asks for its stacks
    # Ctrl-C goes to the whole foreground group; the orchestrator decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _die_with_parent()
        if arguments.standby:
            _import_torch()
            prepare_cuda(arguments.standby)
        spec = read_spec(CONTROL, WorkerSpec, lambda: _open_early(arguments.standby))
        rank = _rank(spec.layout.placement.world_size)
        configure_logging(f"worker {rank}")
    except BadSpec as error:
        print(f"mgpu worker: {error}", file=sys.stderr)
        return EXIT_BAD_SPEC
    Thread(target=_exit_when_stdin_ends, name="stdin-watch", daemon=True).start()
    start_cuda(spec.device)
    _import_torch()  # takes seconds, so not earlier: a worker whose parent is already gone has ended by now
    from mgpu.worker.start.worker import run_worker

    if not run_worker(spec, rank):
        sys.stderr.flush()
        os._exit(EXIT_FAILED)  # without a clean-up, which would wait for lost peers
    return 0


def _die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends."""
    parent = os.getppid()
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(EXIT_PARENT_GONE)


def _exit_when_stdin_ends() -> None:
    while os.read(0, 4096):
        pass  # nothing is sent after the spec
    os._exit(EXIT_PARENT_GONE)


def _import_torch() -> None:
    """Import all that a worker needs; a second call does nothing.

    The garbage collector is off meanwhile: it would visit hundreds of thousands of new objects again and again, free
    none of them, and take a fifth of the time.
    """
    gc.disable()
    importlib.import_module("mgpu.worker.start.worker")
    gc.freeze()
    gc.enable()


def _open_early(device: str) -> None:
    """Open the device and start Triton, in threads, before the spec comes."""
    from mgpu.worker.start.compile_ahead.compile_ahead import start_triton
    from mgpu.worker.start.worker import torch_device

    start_cuda(device)
    start_triton(torch_device(device))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mgpu.worker", description="One worker of mgpu.")
    parser.add_argument("--standby", metavar="DEVICE", help="import torch at once, before the spec comes")
    add_options(parser)
    return parser


def _rank(world_size: int) -> int:
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise BadSpec("RANK and WORLD_SIZE must be set to numbers, as torchrun does") from error
    if size != world_size or not 0 <= rank < size:
        raise BadSpec(f"RANK={rank} and WORLD_SIZE={size} do not fit a plan of {world_size} ranks")
    return rank


if __name__ == "__main__":
    sys.exit(main())
