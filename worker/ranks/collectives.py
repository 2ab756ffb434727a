"""What ranks use to talk: a group inside a stage, channels between stages; and both over torch.distributed.

This is the only file that names torch.distributed, which is joined only if a plan uses nccl or gloo: ranks that use
shared memory open no port at all. Every wait ends at the spec's deadline with `PeerLost`.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous as meet

from mgpu.worker.errors import PeerLost

UNREAD_SENDS = 4
"""Messages that may be under way to one receiver: enough for the tokens that an idle first stage leaves unread."""


class TensorParallelGroup(Protocol):
    """The ranks of one stage, which hold slices of the same layers. Every rank must make the same calls in order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the group, the same bits on every rank; ``x`` may be overwritten."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the ranks' tensors of one shape along the last dimension."""
        ...


class Channel(Protocol):
    """One direction between two ranks. Messages arrive in order; the receiver knows their shapes."""

    def send(self, x: Tensor) -> None:
        """Pass ``x`` on; it may be overwritten afterwards."""
        ...

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Wait for the next message and return it as a new tensor on this rank's device."""
        ...


class SingleRank:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x


class DistGroup:
    """Tensor-parallel group over torch.distributed: gloo for CPU tensors, NCCL for CUDA ones."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.is_capturable = False
        """True once a trial has shown that calls on CUDA tensors can be part of a CUDA graph (capture_check.py)."""
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype is not torch.float32:
            return self.all_reduce(x.float()).to(x.dtype)  # partial sums must not be rounded on the way
        x = x.contiguous()
        with _peer_errors("an all-reduce"):
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _peer_errors("an all-gather"):
            dist.all_gather(parts, x, group=self._group)
        return torch.cat(parts, dim=-1)


class ThroughHost:
    """Carries CUDA tensors through a group of CPU tensors: for several workers on one GPU, or GPUs without NCCL."""

    def __init__(self, inner: TensorParallelGroup) -> None:
        self.rank = inner.rank
        self.size = inner.size
        self._inner = inner

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self._inner.all_reduce(x.cpu()))

    def all_gather(self, x: Tensor) -> Tensor:
        return self._inner.all_gather(x.cpu()).to(x.device)


class MeasurableGroup:
    """Wraps every rank's group; links.py shows what is inside.

    Calls pass through, except while start-up measures memory or compiles kernels: then the rank works ``alone``. Calls
    reach no other rank, and results only have the right shapes.
    """

    def __init__(self, inner: TensorParallelGroup) -> None:
        self.rank = inner.rank
        self.size = inner.size
        self.alone = False
        self.inner = inner

    def all_reduce(self, x: Tensor) -> Tensor:
        return x if self.alone else self.inner.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.size, dim=-1) if self.alone else self.inner.all_gather(x)


class AbsentRanks(SingleRank):
    """Stands for ranks that have not met yet, in a process that only compiles."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def absent_ranks(rank: int, size: int) -> MeasurableGroup:
    """Return a group of a rank that works alone, before it has met the others."""
    group = MeasurableGroup(AbsentRanks(rank, size))
    group.alone = True
    return group


class DistChannel:
    """`Channel` over torch.distributed. Messages live on ``device``; the backend sends from ``wire``."""

    def __init__(self, peer: int, tag: int, device: torch.device, wire: torch.device) -> None:
        self._peer = peer
        self._tag = tag
        self._device = device
        self._wire = wire
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, x: Tensor) -> None:
        """Start sending; wait only for the message of `UNREAD_SENDS` sends ago."""
        copy = x.to(self._wire, copy=True).contiguous()
        with _peer_errors(f"rank {self._peer} to read"):
            work = dist.isend(copy, self._peer, tag=self._tag)
            assert work is not None
            self._under_way.append((work, copy))
            if len(self._under_way) > UNREAD_SENDS:
                self._under_way.popleft()[0].wait()

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        out = torch.empty(tuple(shape), dtype=dtype, device=self._wire)
        with _peer_errors(f"rank {self._peer} to send"):
            dist.recv(out, self._peer, tag=self._tag)
        return out.to(self._device)


@contextmanager
def _peer_errors(what: str) -> Iterator[None]:
    """Turn errors into PeerLost and say what was waited for: backends raise RuntimeError for lost and silent peers."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"lost a peer while waiting for {what}: {str(error).splitlines()[0]}") from error


def start_process_group(
    rendezvous: str,
    rank: int,
    world_size: int,
    *,
    nccl_device: torch.device | None,
    start_s: float,
    timeout_s: float,
    meeting: str = "ranks",
    opens_store: bool | None = None,
) -> None:
    """Join the default group once all ranks are there, within ``start_s``; later operations may take ``timeout_s``.

    ``rendezvous`` is a ``file://`` URL, or empty for MASTER_ADDR and MASTER_PORT. The store there is opened by rank 0,
    or as ``opens_store`` says, and may have served an earlier ``meeting``. With ``nccl_device``, CUDA tensors go by
    NCCL; CPU tensors always go by gloo.
    """
    opens_store = rank == 0 if opens_store is None else opens_store
    if rendezvous:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")  # one machine: nothing may listen on a network
        os.environ.setdefault("NCCL_RAS_ENABLE", "0")
    if os.environ.get("MGPU_NO_P2P") == "1":
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
    with _peer_errors("all ranks to start"):
        place = meet(rendezvous or "env://", 0 if opens_store else 1, world_size, timeout=timedelta(seconds=start_s))
        whole, _, _ = next(place)
        store = dist.PrefixStore(meeting, whole)  # type: ignore[attr-defined]
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{peer}" for peer in range(world_size)], timedelta(seconds=start_s))
        dist.init_process_group(
            "gloo" if nccl_device is None else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=nccl_device,
        )


def new_groups(rank_sets: Sequence[Sequence[int]], timeout_s: float) -> list[dist.ProcessGroup]:
    """Make a group of each set of ranks. All ranks of the world must call this with the same sets."""
    return [dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s)) for ranks in rank_sets]


def leave_process_group() -> None:
    """Wait until all ranks are leaving, then leave. Does nothing if this rank never joined.

    A rank that left at once would reset connections that still hold data for its peers.
    """
    if not dist.is_initialized():
        return
    with suppress(PeerLost), _peer_errors("all ranks to leave"):
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()
