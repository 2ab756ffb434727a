"""What the engine needs of the workers of an epoch, processes of this machine or of other hosts."""

from collections.abc import Container, Sequence
from typing import Protocol

import zmq

from mgpu.orchestrator.processes.child_process import ChildProcess
from mgpu.orchestrator.processes.failures import WorkerLost
from mgpu.protocol.internal.worker_messages import Loaded, LoadProgress, Ready, StepResult
from mgpu.protocol.model.kv_pools import PoolSize


class Group(Protocol):
    """`WorkerGroup` and `HostGroup` say more about each part."""

    epoch: int
    world_size: int
    loaded: dict[int, Loaded]
    ready: dict[int, Ready]
    progress: dict[int, LoadProgress]

    @property
    def sockets(self) -> Sequence["zmq.Socket[bytes]"]: ...

    @property
    def processes(self) -> Sequence[ChildProcess]: ...

    @property
    def is_whole(self) -> bool: ...

    @property
    def is_waiting(self) -> bool:
        """True while there is nothing that could make progress: workers cannot be started yet."""
        ...

    def park(self) -> None: ...

    def wake_up(self) -> None: ...

    def start(self, captures_library: bool = True) -> None:
        """Start the workers. ``captures_library``: whether sums of NCCL may be part of their CUDA graphs."""
        ...

    def publish(self, data: bytes) -> None: ...

    def allocate_cache(self, at_most: PoolSize | None = None) -> PoolSize: ...

    def try_result(self) -> StepResult | None: ...

    def take_in(self, events: Container[object]) -> None: ...

    def broken(self, message: str) -> WorkerLost: ...

    def stop(self, deadline_s: float, hurry_fd: int = -1) -> None: ...

    def kill_with_stacks(self) -> None: ...

    def kill_at_once(self) -> None: ...

    def kill(self) -> None: ...
