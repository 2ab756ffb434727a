"""The life of one worker: meet the other ranks, load, allocate, warm up, then execute plans until told to stop."""

import gc
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.protocol.internal.process.child import BadSpec
from mgpu.protocol.internal.worker_messages import (
    AllocateCache,
    LoadProgress,
    Ready,
    Shutdown,
    WorkerFailure,
    WorkerSpec,
)
from mgpu.protocol.model.kv_pools import PoolSize
from mgpu.worker.errors import BadPlan, CaptureHung, OutOfMemory
from mgpu.worker.ranks.links import Links, connect
from mgpu.worker.start.compile_ahead.compile_ahead import CompileAhead, start_triton
from mgpu.worker.start.device import cuda_ordinal
from mgpu.worker.start.startup import StartUp
from mgpu.worker.steps.control_socket import ControlSocket
from mgpu.worker.steps.step_loop import StepLoop

PROGRESS_INTERVAL_S = 0.1
PEERS_LOAD_TIMEOUT_S = 3600.0
"""Longest wait for the order to allocate once this rank has its weights. Other ranks may load for long. The
orchestrator watches them, and if it ends itself, so does standard input."""
_WARM_UP_TOKENS = 16


def run_worker(spec: WorkerSpec, rank: int) -> bool:
    """Run one rank to its end. Return False after a failure, which has been sent to the orchestrator."""
    worker = Worker(spec, rank)
    try:
        worker.run()
        return True
    except Exception as error:  # the edge of the process: the orchestrator must know, whatever it was
        worker.report_failure(error)
        return False
    finally:
        worker.control.close()


class Worker:
    """One rank. `run` returns after `Shutdown`; if it raises instead, ``phase`` says where."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        self.spec = spec
        self.place = spec.layout.placement.place_of(rank)
        self.device = torch.device("cpu")
        self.phase = "spawn"
        self.phase_s: dict[str, float] = {}
        self.control = ControlSocket(spec.endpoint, spec.epoch, spec.joined)
        self._links: Links | None = None
        self._phase_began_s = 0.0
        self._reported_s = 0.0

    def run(self) -> None:
        """Connect, load, allocate, warm up, execute."""
        spec, rank = self.spec, self.place.rank
        if spec.num_threads > 0:
            torch.set_num_threads(spec.num_threads)
        self.device = _open_device(spec.device)
        with ExitStack() as compiling:
            with self._timed("rendezvous"):
                compiling.enter_context(CompileAhead(spec, self.place, self.device).running())
                self._links = links = connect(spec, rank, self.device)
            start_up = StartUp(spec, self.place, self.device, links)
            with self._timed("weights"):
                stage, loaded_bytes = start_up.load(self._progress)
                compiling.close()  # waits until all kernels are ready
                stage.choose_attention()
                self._report(loaded_bytes, loaded_bytes)
                self.control.send(start_up.measure(stage))
        pool = self._wait_for_allocation()
        if pool is None:
            links.close()
            return
        with self._timed("cache"):
            runner = start_up.allocate(stage, pool)
        with self._timed("warmup"):
            room = min(spec.limits.max_seq_len, pool.num_blocks * spec.limits.block_size)
            tokens = max(1, min(_WARM_UP_TOKENS, spec.limits.max_batch_tokens, room - 2))
            runner.warm_up(tokens, spec.epoch)
            gc.collect()
            gc.freeze()  # all of these objects stay: no collection between steps need visit them
            if self.device.type == "cuda" and not spec.layout.cpu_experts_of(self.place.stage_index):
                # A step has little to do on the host. Threads for it would cost more than they save, and keep cores
                # busy that compute the masks of grammars.
                torch.set_num_threads(1)
        self.control.send(Ready(spec.epoch, rank, self.phase_s, loaded_bytes, links.notes, tokens))
        self.phase = "steps"
        StepLoop(runner, self.control, self.device, reports=rank == spec.layout.placement.output_rank).run()
        runner.close()
        links.close()

    def _wait_for_allocation(self) -> PoolSize | None:
        """Return the pools to allocate; None if the orchestrator stops this worker before."""
        order = self.control.receive(int(PEERS_LOAD_TIMEOUT_S * 1000))
        if order is None:
            raise TimeoutError(f"no order to allocate the KV cache within {PEERS_LOAD_TIMEOUT_S:g} s")
        if isinstance(order, Shutdown):
            return None
        if not isinstance(order, AllocateCache):
            raise BadPlan(f"{type(order).__name__} before the KV cache was allocated")
        return PoolSize(order.num_blocks, order.num_pages)

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

    def report_failure(self, error: Exception) -> None:
        """Tell the other ranks and the orchestrator what ended this one.

        The failure of one rank soon makes the others fail, because they wait for it. The earliest is the cause, so each
        rank reports when it failed, by a clock that all processes of a machine share; the orchestrator waits a moment
        for all reports and shows the first. Example: rank 1 runs out of memory at 10.000 s. It takes the time, then
        sets the word of the shared file that ends its peers' waits. Rank 0 raises PeerLost at 10.001 s, and its report
        may even arrive first, but the user reads that rank 1 ran out of memory.
        """
        at_s = time.monotonic()
        if self._links is not None:
            self._links.report_failure()
        is_mistake = isinstance(error, (CheckpointError, BadSpec))
        # OutOfMemory is no mistake: a new start may find more memory free.
        is_explained = is_mistake or isinstance(error, OutOfMemory)
        message = str(error) if is_explained else one_line(error, self.device)
        text = "" if is_explained else "".join(traceback.format_exception(error))
        if text:
            print(text, file=sys.stderr, flush=True)
        where = self.spec.epoch, self.place.rank, self.phase
        in_capture = isinstance(error, CaptureHung)
        self.control.send(WorkerFailure(*where, message, text, at_s, is_mistake, in_capture))


def torch_device(name: str) -> torch.device:
    """Return the device that a spec names."""
    return torch.device(name) if name == "cpu" else torch.device("cuda", cuda_ordinal(name))


def _open_device(name: str) -> torch.device:
    device = torch_device(name)
    start_triton(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def one_line(error: Exception, device: torch.device) -> str:
    """Return in one line what happened, with the way out if there is one."""
    if isinstance(error, torch.OutOfMemoryError):
        free, total = torch.cuda.mem_get_info(device)
        return (
            f"{device} is out of memory ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free): use more GPUs, --quant, "
            "a smaller --memory-fraction or fewer tokens per step"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the latter is torch's on a CPU
        return "out of memory: use a smaller model, fewer workers or a smaller KV cache"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
