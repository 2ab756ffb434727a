"""Real worker processes, led by a test in the place of the orchestrator."""

import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import zmq

from harness.ranks.forked import ForkedProcess, shareable
from harness.specs import BLOCK_SIZE
from mgpu.protocol.internal.process.child import frame_spec
from mgpu.protocol.internal.worker_messages import (
    CONTROL,
    AllocateCache,
    Loaded,
    LoadProgress,
    NewRow,
    Ready,
    RowSampling,
    Shutdown,
    StepPlan,
    StepResult,
    WorkerFailure,
    WorkerSpec,
)
from mgpu.protocol.model.shared_memory_layout import shared_layout

DEADLINE_S = 60.0


def environ_of(rank: int, world_size: int) -> dict[str, str]:
    """Return what torchrun would tell a worker."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}


def launch(rank: int, world_size: int) -> "subprocess.Popen[bytes]":
    """Start one worker with torchrun's environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "mgpu.worker"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environ_of(rank, world_size),
    )


@dataclass
class Workers:
    """All workers of one spec, with a socket to each."""

    spec: WorkerSpec
    folder: Path
    processes: list[ForkedProcess] = field(default_factory=list)
    sockets: list[zmq.Socket[bytes]] = field(default_factory=list)
    seen: list[object] = field(default_factory=list)
    failures: list[WorkerFailure] = field(default_factory=list)
    num_blocks: int = 0
    num_pages: int = 0

    def start(self, context: zmq.Context[zmq.Socket[bytes]], master_port: int | None = None) -> None:
        """Start all ranks. With a port they meet at MASTER_ADDR and MASTER_PORT, as under torchrun."""
        fd = -1 if master_port else self._share()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(master_port), "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(self.spec.layout.placement.world_size):
            spec, fds = self.listen(context, rank), [fd] if fd >= 0 else []
            environ = environ_of(rank, spec.layout.placement.world_size) | (address if master_port else {})
            process = ForkedProcess("mgpu.worker", [], fds, **environ)
            self.processes.append(process)
            process.write(frame_spec(CONTROL.encode(spec)))
        if fd >= 0:
            os.close(fd)

    def listen(self, context: zmq.Context[zmq.Socket[bytes]], rank: int) -> WorkerSpec:
        """Open the socket to a rank and give its spec."""
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        endpoint = f"ipc://{self.folder}/w{rank}"
        socket.bind(endpoint)
        self.sockets.append(socket)
        return replace(self.spec, endpoint=endpoint)

    def _share(self) -> int:
        spec = self.spec
        if spec.layout.placement.world_size == 1:
            return -1
        if spec.layout.transport == "gloo":
            self.spec = replace(spec, rendezvous=f"file://{self.folder}/group")
            return -1
        layout = shared_layout(spec.layout, spec.limits, spec.facts.hidden_size)
        fd = shareable(os.memfd_create("mgpu-test"))
        os.ftruncate(fd, layout.total_bytes)
        self.spec = replace(spec, shared_fd=fd, shared_bytes=layout.total_bytes)
        return fd

    def receive(self, rank: int) -> object:
        """Return a rank's next message, and keep it in `seen`."""
        if not self.sockets[rank].poll(int(DEADLINE_S * 1000)):
            raise TimeoutError(f"rank {rank} is silent; exit status {self.processes[rank].poll()}")
        message = CONTROL.decode(self.sockets[rank].recv())
        self.seen.append(message)
        if isinstance(message, WorkerFailure):
            self.failures.append(message)
        return message

    def expect(self, rank: int, kind: type) -> object:
        """Skip progress and give the next message, which must be of ``kind``."""
        while isinstance(message := self.receive(rank), LoadProgress) and kind is not LoadProgress:
            pass
        assert isinstance(message, kind), message
        return message

    def send(self, message: object, ranks: Sequence[int] | None = None) -> None:
        for rank in range(len(self.sockets)) if ranks is None else ranks:
            self.sockets[rank].send(CONTROL.encode(message))

    def make_ready(self) -> None:
        """Lead all workers to readiness, with the smallest pool that any of them reports."""
        loaded = [self.expect(rank, Loaded) for rank in range(len(self.sockets))]
        self.num_blocks = min(message.num_blocks for message in loaded if isinstance(message, Loaded))
        self.num_pages = min(message.num_pages for message in loaded if isinstance(message, Loaded))
        self.send(AllocateCache(self.spec.epoch, self.num_blocks, self.num_pages))
        for rank in range(len(self.sockets)):
            self.expect(rank, Ready)

    def step(self, plan: StepPlan) -> StepResult:
        """Have one step executed and give its tokens."""
        self.send(plan)
        result = self.expect(self.spec.layout.placement.output_rank, StepResult)
        assert isinstance(result, StepResult)
        assert result.step == plan.step
        return result

    def generate(
        self, prompt_ids: list[int], count: int, sampling: RowSampling | None = None, first_step: int = 1
    ) -> list[int]:
        """Run one request alone, row 0, blocks in descending order; of window layers the last three have pages."""
        blocks = [*range(self.num_blocks - 1, -1, -1)][: -(-(len(prompt_ids) + count) // BLOCK_SIZE)]
        ids = b"".join(struct.pack("<i", id_) for id_ in prompt_ids)
        row = NewRow(0, ids, len(prompt_ids), blocks, sampling or RowSampling())
        epoch, stages, output = self.spec.epoch, self.spec.layout.placement.num_stages, []
        for index in range(count):
            start = len(prompt_ids) + index - 1 if index else 0
            length = 1 if index else len(prompt_ids)
            new_rows = [] if index else [row]
            plan = StepPlan(epoch, first_step + index * stages, [], new_rows, [], [], [0], [start], [length], [1])
            if self.num_pages and start % BLOCK_SIZE == 0:
                numbers = range(start // BLOCK_SIZE, -(-(start + length) // BLOCK_SIZE))
                pages = [number % 3 for number in numbers]
                plan = replace(plan, page_blocks=[blocks[number] for number in numbers], page_ids=pages)
            output += self.step(plan).token_ids
        self.send(StepPlan(epoch, first_step + count * stages, [0], [], [], [], [], [], [], []))
        return output

    def shut_down(self) -> None:
        self.send(Shutdown(self.spec.epoch))
        assert self.wait_all() == [0] * len(self.processes)

    def wait_all(self, deadline_s: float = DEADLINE_S) -> list[int]:
        ends_s = time.monotonic() + deadline_s
        return [process.wait(max(0.0, ends_s - time.monotonic())) for process in self.processes]


@contextmanager
def running(spec: WorkerSpec, folder: Path, master_port: int | None = None) -> Iterator[Workers]:
    """Start the workers of a spec; none survives the block."""
    workers = Workers(spec, folder)
    with zmq.Context() as context:
        try:
            workers.start(context, master_port)
            yield workers
        finally:
            for process in workers.processes:
                process.close()
            for socket in workers.sockets:
                socket.close()
