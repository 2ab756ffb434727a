"""Entry of one worker process: ``python -m mgpu.worker``.

The environment is torchrun's: RANK, LOCAL_RANK, WORLD_SIZE, and MASTER_ADDR, MASTER_PORT where the spec names no
rendezvous file. The spec comes on standard input (4 bytes of little-endian length, then the message), which
the parent keeps open: its end ends the worker.
"""

import argparse
import faulthandler
import gc
import importlib
import os
import signal
import sys

from mgpu.protocol.internal.child import BadSpec, read_spec
from mgpu.protocol.internal.worker_messages import CONTROL, WorkerSpec
from mgpu.worker.device import start_cuda
from mgpu.worker.start import lifeline

EXIT_FAILED = 1
EXIT_BAD_SPEC = 2


def main() -> int:
    """Run one worker. The exit status is 0 after an orderly shutdown."""
    arguments = _parser().parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the orchestrator asks where a group that failed stands before it kills it
    # Ctrl-C goes to the whole foreground group; the orchestrator decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        lifeline.die_with_parent()
        if arguments.standby:
            _import_torch()
        spec = read_spec(CONTROL, WorkerSpec)
        rank = _rank(spec.layout.placement.world_size)
    except BadSpec as error:
        print(f"mgpu worker: {error}", file=sys.stderr)
        return EXIT_BAD_SPEC
    lifeline.exit_when_stdin_ends()
    start_cuda(spec.device)
    # Only now the seconds of importing torch: a parent that is already gone must not wait for them.
    _import_torch()
    from mgpu.worker.start.worker import run_worker

    if not run_worker(spec, rank):
        sys.stderr.flush()
        os._exit(EXIT_FAILED)  # no clean-up that waits for lost peers
    return 0


def _import_torch() -> None:
    """Import all that a worker needs; a second call does nothing.

    The garbage collector would look at hundreds of thousands of new objects again and again and find nothing to free:
    a fifth of the time.
    """
    gc.disable()
    importlib.import_module("mgpu.worker.start.worker")
    gc.freeze()
    gc.enable()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mgpu.worker", description="One worker of mgpu.")
    parser.add_argument("--standby", action="store_true", help="import torch at once, not when the spec is there")
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
