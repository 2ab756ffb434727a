"""A tensor-parallel group whose ranks are threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
DEADLINE_S = 150.0


@dataclass
class ThreadGroup:
    """A tensor-parallel group whose ranks are threads of this process."""

    rank: int
    size: int
    barrier: threading.Barrier
    shared: list[Tensor | None]

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), dim=-1)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.shared[self.rank] = x
        self.barrier.wait(DEADLINE_S)
        parts = [part for part in self.shared if part is not None]
        self.barrier.wait(DEADLINE_S)
        return parts


def run_ranks(size: int, work: Callable[[ThreadGroup], R]) -> list[R]:
    """Run ``work`` on every rank of a group; the first error ends them all and is raised."""
    barrier = threading.Barrier(size)
    shared: list[Tensor | None] = [None] * size

    def guarded(rank: int) -> R:
        try:
            with torch.inference_mode():
                return work(ThreadGroup(rank, size, barrier, shared))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception(DEADLINE_S)) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
