"""The life of one worker: meet the others, load, allocate, warm up, then execute plans until told to stop."""

import gc
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.protocol.internal.child import BadSpec
from mgpu.protocol.internal.worker_messages import (
    AllocateCache,
    LoadProgress,
    Ready,
    Shutdown,
    WorkerFailure,
    WorkerSpec,
)
from mgpu.worker.compile_ahead.compile_ahead import start_triton
from mgpu.worker.control_socket import ControlSocket
from mgpu.worker.device import cuda_ordinal
from mgpu.worker.errors import BadPlan, OutOfMemory
from mgpu.worker.ranks.links import Links, connect
from mgpu.worker.start.startup import StartUp
from mgpu.worker.steps.step_loop import StepLoop

PROGRESS_INTERVAL_S = 0.1
PEERS_LOAD_TIMEOUT_S = 3600.0
"""Longest silence between this rank's weights and the order to allocate: other ranks may load for long, and the
orchestrator watches them; end of file on standard input tells of its own end."""
_WARM_UP_TOKENS = 16


def run_worker(spec: WorkerSpec, rank: int) -> bool:
    """Live as one rank; gives False after a failure, which the orchestrator has been told by then."""
    worker = Worker(spec, rank)
    try:
        worker.run()
        return True
    except Exception as error:  # the edge of the process: whatever it was, the orchestrator must know
        worker.fail(error)
        return False
    finally:
        worker.control.close()


def _open_device(name: str) -> torch.device:
    device = torch.device(name) if name == "cpu" else torch.device("cuda", cuda_ordinal(name))
    start_triton(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class Stopped(Exception):
    """The orchestrator wants no more of this worker before it was ready."""


class Worker:
    """One rank. `run` returns after `Shutdown` and raises what went wrong, with ``phase`` saying where."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        self.spec = spec
        self.place = spec.layout.placement.place_of(rank)
        self.device = torch.device("cpu")
        self.phase = "spawn"
        self.phase_s: dict[str, float] = {}
        self.control = ControlSocket(spec.endpoint, spec.epoch)
        self._links: Links | None = None
        self._phase_began_s = 0.0
        self._reported_s = 0.0

    def run(self) -> None:
        """Live: connect, load, allocate, warm up, execute."""
        spec, rank = self.spec, self.place.rank
        if spec.num_threads > 0:
            torch.set_num_threads(spec.num_threads)
        self.device = _open_device(spec.device)
        with self._timed("rendezvous"):
            self._links = links = connect(spec, rank, self.device)
        start_up = StartUp(spec, self.place, self.device, links)
        with self._timed("weights"):
            stage, loaded_bytes = start_up.load(self._progress)
            self._report(loaded_bytes, loaded_bytes)
            self.control.send(start_up.measure(stage))
        try:
            num_blocks = self._wait_for_allocation()
        except Stopped:
            links.close()
            return
        with self._timed("cache"):
            runner = start_up.allocate(stage, num_blocks)
        with self._timed("warmup"):
            room = min(spec.limits.max_seq_len, num_blocks * spec.limits.block_size)
            tokens = max(1, min(_WARM_UP_TOKENS, spec.limits.max_batch_tokens, room - 2))
            runner.warm_up(tokens, spec.epoch)
            gc.collect()
            gc.freeze()  # what is here now stays: no collection need look at it between steps
        self.control.send(Ready(spec.epoch, rank, self.phase_s, loaded_bytes, links.notes, tokens))
        self.phase = "steps"
        StepLoop(runner, self.control, self.device, reports=rank == spec.layout.placement.output_rank).run()
        links.close()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks and the orchestrator what ended this one."""
        at_s = time.monotonic()
        if self._links is not None:
            self._links.report_failure()
        is_mistake = isinstance(error, (CheckpointError, BadSpec))
        is_told = is_mistake or isinstance(error, OutOfMemory)  # which may be another once memory is free again
        message = str(error) if is_told else one_line(error, self.device)
        text = "" if is_told else "".join(traceback.format_exception(error))
        if text:
            print(text, file=sys.stderr, flush=True)
        self.control.send(WorkerFailure(self.spec.epoch, self.place.rank, self.phase, message, text, at_s, is_mistake))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self.phase = phase
        self._phase_began_s = time.monotonic()
        self._report(0, 0)
        yield
        self.phase_s[phase] = time.monotonic() - self._phase_began_s

    def _progress(self, done_bytes: int, total_bytes: int) -> None:
        if time.monotonic() - self._reported_s >= PROGRESS_INTERVAL_S:
            self._report(done_bytes, total_bytes)

    def _report(self, done_bytes: int, total_bytes: int) -> None:
        self._reported_s = time.monotonic()
        elapsed_s = self._reported_s - self._phase_began_s
        self.control.send(
            LoadProgress(self.spec.epoch, self.place.rank, self.phase, done_bytes, total_bytes, elapsed_s)
        )

    def _wait_for_allocation(self) -> int:
        order = self.control.receive(int(PEERS_LOAD_TIMEOUT_S * 1000))
        if order is None:
            raise TimeoutError(f"no order to allocate the KV cache within {PEERS_LOAD_TIMEOUT_S:g} s")
        if isinstance(order, Shutdown):
            raise Stopped
        if not isinstance(order, AllocateCache):
            raise BadPlan(f"{type(order).__name__} before the KV cache was allocated")
        return order.num_blocks


def one_line(error: BaseException, device: torch.device) -> str:
    """Say in one line what happened, with the way out where there is one."""
    if isinstance(error, torch.OutOfMemoryError):
        free, total = torch.cuda.mem_get_info(device)
        return (
            f"{device} is out of memory ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free): use more GPUs, --quant, "
            "a smaller --memory-fraction or fewer tokens per step"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the latter is torch's on CPU
        return "out of memory: use a smaller model, fewer workers or a smaller KV cache"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
