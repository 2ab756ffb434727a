"""Open a `PeerGroup`: allocate, exchange handles, map, empty, try. All ranks of a stage use it, or none does.

Where ranks cannot reach each other's memory, they try again with memory of the host, which all of them map and pin.

A rank that used the kernels while another did not would wait on the GPU for sums that never come. So every step ends
with `_agree`: all ranks tell each other, over the group that they already have, whether it went well. As soon as one
reports a problem, all see it at the same step, and all keep that group. With two ranks, of which GPU 1 cannot reach
GPU 0:

    step       rank 0                       rank 1                              agreed
    allocate   a buffer and its handle      a buffer and its handle             no problem; handles are exchanged
    map        rank 1's buffer is mapped    "no peer access between GPUs"       rank 1 has a problem: both give up

Without that problem the steps left are: empty the areas (no rank writes before all are empty), and try the kernels
(peer_check.py). Every rank makes the same calls of `_agree` in the same order, also the one that has a problem.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.placement import RankPlace
from mgpu.protocol.model.shared_memory_layout import HostRegion
from mgpu.worker.kernels.peers.memory import Area, AreaShape, PeerAlarm, buffer_bytes, cut
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.ranks.agreement import CannotUse, RankStatus, exchange, gpu_of, leave_in_order, this_machine
from mgpu.worker.ranks.collectives import AbsentRanks, TensorParallelGroup
from mgpu.worker.ranks.cuda_ipc import MappedMemory, export, map_exported
from mgpu.worker.ranks.host_channel import pin
from mgpu.worker.ranks.peer_check import float8_problem, launch_checks, peer_problem
from mgpu.worker.ranks.peer_group import MOST_RANKS, PeerGroup, ReduceLimits, area_shapes, captured_rows
from mgpu.worker.ranks.shared_memory import SharedSegment
from mgpu.worker.ranks.sum_times import quickest_rows

SWITCH = "MGPU_PEER_REDUCE"
"""0: never use the kernels. 1: use them also if ranks share a GPU; there waiting kernels take turns: for tests only."""
_CHECK_S = 30.0
"""Longest wait of a kernel while the group is tried: ranks compile the same kernels, but not equally fast."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Where the ranks of a stage have areas in the file that all ranks share."""

    segment: SharedSegment
    regions: Sequence[HostRegion]
    """By rank of the stage."""

    def view(self, rank: int) -> Tensor:
        region = self.regions[rank]
        return self.segment.view(region.start, region.nbytes, torch.uint8)


class PeerSetup:
    """Opens a group and owns its memory: this rank's buffer and the mappings of the others'."""

    def __init__(
        self,
        group: TensorParallelGroup,
        host_group: TensorParallelGroup,
        device: torch.device,
        host_memory: HostMemory | None = None,
        broken: frozenset[int] = frozenset(),
        wants_float8: bool = False,
    ) -> None:
        """``group`` makes the sums that kernels do not; ``host_group`` is the same ranks for CPU tensors.

        ``broken``: ranks whose memory a trial has found unusable, although the driver maps it. ``wants_float8``: layers
        take norms that are quantized.
        """
        self._group = group
        self._host_group = host_group
        self._host_memory = host_memory
        self._broken = broken
        self._wants_float8 = wants_float8
        self._device = device
        self._mine: Tensor | None = None
        self._mapped: list[MappedMemory] = []
        self._reason = ""
        self.note = ""
        """A line for the start-up log: what is used, or why not."""

    def open(self, limits: ReduceLimits, timeout_s: float) -> TensorParallelGroup:
        """Return a `PeerGroup`, or the group as it was if any rank cannot have one. PeerLost when a rank is gone."""
        try:
            opened = self._open(limits, timeout_s)
        except CannotUse as reason:
            self._unmap()
            self._mine = None
            self._reason = str(reason)
            self.note = f"partial sums do not go by own kernels: {reason}"
            return self._group
        self.note = f"partial sums of up to {opened.most_rows} tokens go by own kernels over peer memory"
        return opened

    def open_on_host(self, limits: ReduceLimits, timeout_s: float) -> TensorParallelGroup:
        """After `open` in vain, return a group whose kernels add up through host memory, as far as they are quicker."""
        if self._host_memory is None:
            return self._group
        through_host = ReduceLimits.through_host(limits.ranks, limits.dim, limits.dtype)
        try:
            opened = self._try_host(self._host_memory, through_host, timeout_s)
        except CannotUse as second:
            self.note += "" if str(second) == self._reason else f"; through host memory: {second}"
            return self._group
        if not opened.most_rows:
            self.note += "; NCCL is quicker than host memory"
            return self._group
        self.note = (
            f"partial sums of up to {opened.most_rows} tokens go by own kernels through pinned host memory: "
            f"{self._reason}"
        )
        return opened

    def _try_host(self, memory: HostMemory, limits: ReduceLimits, timeout_s: float) -> PeerGroup:
        problem = refusal(limits, self._device)
        shapes = [] if problem else area_shapes(limits)
        if not problem:
            try:
                for rank in range(self._group.size):
                    pin(memory.view(rank))
            except RuntimeError as error:
                problem = f"host memory cannot be pinned: {str(error).splitlines()[0]}"
        gpus = [status.gpu for status in self._agree(problem)]
        if len(set(gpus)) < len(gpus) and os.environ.get(SWITCH) != "1":
            raise CannotUse("ranks share a GPU")
        views = [memory.view(rank) for rank in range(self._group.size)]
        areas = cut(views[self._group.rank], [view.data_ptr() for view in views], shapes, self._device)
        make = self._checked(areas, limits, timeout_s)
        if not captured_rows(self._group):
            return make(None)
        times = quickest_rows(make(None), self._group, self._host_group, self._device)
        return make(times)

    def _open(self, limits: ReduceLimits, timeout_s: float) -> PeerGroup:
        problem = refusal(limits, self._device) or peer_refusal()
        shapes = [] if problem else area_shapes(limits)
        buffer, peers = self._allocate(shapes, problem)
        areas = cut(buffer, self._map_all(buffer, peers), shapes, self._device)
        return self._checked(areas, limits, timeout_s)(None)

    def _checked(
        self, areas: Sequence[Area], limits: ReduceLimits, timeout_s: float
    ) -> Callable[[int | None], PeerGroup]:
        """Try kernels over these areas; return what makes a group of them, for so many rows."""
        torch.cuda.synchronize(self._device)
        self._agree("")  # no rank writes before all areas are empty
        failed = torch.zeros(1, dtype=torch.int32, device=self._device)
        seen = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        alarm = PeerAlarm(failed, seen, int(min(timeout_s, _CHECK_S) * 1e6))
        trial = PeerGroup(self._group, areas, alarm, limits)
        self._agree(peer_problem(trial, self._device))
        in_float8 = self._can_quantize(trial)
        alarm = PeerAlarm(failed, seen, int(timeout_s * 1e6))
        return lambda most_rows: PeerGroup(self._group, areas, alarm, limits, most_rows, in_float8)

    def _can_quantize(self, trial: PeerGroup) -> bool:
        """Return whether norms within sums may be quantized, the same on all ranks. CannotUse after a vain wait."""
        if not self._wants_float8 or self._any_problem("" if can_quantize(trial.limits, self._device) else "no float8"):
            return False
        has_problem = self._any_problem(float8_problem(trial, self._device))
        self._agree("a rank waited in vain" if trial.has_failed else "")
        return not has_problem

    def _any_problem(self, problem: str) -> bool:
        return any(each.problem for each in exchange(self._host_group, self._device, problem))

    def _allocate(self, shapes: list[AreaShape], problem: str) -> tuple[Tensor, list[RankStatus]]:
        """Return this rank's buffer, and what the ranks say of theirs."""
        handle = b""
        if not problem:
            try:
                self._mine = torch.empty(buffer_bytes(shapes), dtype=torch.uint8, device=self._device)
                handle = export(self._mine)
            except RuntimeError as error:  # CUDA's, out of memory included: a server without these kernels still works
                problem = f"memory cannot be shared: {str(error).splitlines()[0]}"
        peers = self._agree(problem, handle)
        assert self._mine is not None
        return self._mine, peers

    def _map_all(self, buffer: Tensor, peers: list[RankStatus]) -> list[int]:
        """Return where each rank's buffer begins as this process sees it."""
        addresses, problem = [], ""
        for rank, peer in enumerate(peers):
            try:
                addresses.append(buffer.data_ptr() if rank == self._group.rank else self._map(rank, peer))
            except (CannotUse, RuntimeError) as error:
                problem = problem or f"rank {rank}'s memory cannot be mapped: {str(error).splitlines()[0]}"
        self._agree(problem)
        return addresses

    def _map(self, rank: int, peer: RankStatus) -> int:
        index, this_gpu = peer.index, gpu_of(self._device)
        if peer.machine != this_machine():
            raise CannotUse("it is on another machine")
        if peer.gpu == this_gpu and os.environ.get(SWITCH) != "1":
            raise CannotUse("it shares this GPU")
        if rank in self._broken:
            raise CannotUse("peer access failed its trial")
        is_other = peer.gpu != this_gpu and index != self._device.index and index < torch.cuda.device_count()
        if is_other and not torch.cuda.can_device_access_peer(self._device, index):
            raise CannotUse(f"no peer access between GPUs {self._device.index} and {index}")
        self._mapped.append(map_exported(peer.handle, self._device))
        return self._mapped[-1].memory.data_ptr()

    def _agree(self, problem: str, handle: bytes = b"") -> list[RankStatus]:
        """Tell all ranks how this one is doing, and return what they say. CannotUse if one has a problem."""
        peers = exchange(self._host_group, self._device, problem, handle)
        for rank, peer in enumerate(peers):
            if peer.problem:
                raise CannotUse(f"rank {rank} of {len(peers)}: {peer.problem}")
        return peers

    def close(self) -> None:
        """Unmap when no rank writes any more, then free when no rank has this buffer mapped."""
        if self._mine is not None:
            leave_in_order(self._host_group, self._device, self._unmap)
            self._mine = None

    def _unmap(self) -> None:
        while self._mapped:
            self._mapped.pop().unmap()


def launch_trial(spec: WorkerSpec, place: RankPlace, device: torch.device) -> None:
    """Launch the kernels that will be tried between the GPUs of a stage, so that they are compiled."""
    group = lone_group(spec, place, device)
    if group is not None:
        launch_checks(group, device, spec.layout.quant == "fp8" and can_quantize(group.limits, device))


def lone_group(spec: WorkerSpec, place: RankPlace, device: torch.device) -> PeerGroup | None:
    """Return a group over memory of this GPU alone; None if the stage will not try any over peer memory."""
    if not 1 < place.tp_size <= MOST_RANKS:
        return None
    limits = ReduceLimits.of(place.tp_size, spec.facts.hidden_size, getattr(torch, spec.layout.dtype))
    if refusal(limits, device) or peer_refusal():
        return None
    shapes = area_shapes(limits)
    buffer = torch.empty(buffer_bytes(shapes), dtype=torch.uint8, device=device)
    areas = cut(buffer, [buffer.data_ptr()] * place.tp_size, shapes)
    failed = torch.zeros(1, dtype=torch.int32, device=device)
    return PeerGroup(AbsentRanks(place.tp_rank, place.tp_size), areas, PeerAlarm(failed, failed.clone(), 0), limits)


def refusal(limits: ReduceLimits, device: torch.device) -> str:
    """Return why this rank does not try the kernels; empty if it does."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if not uses_kernels(device):
        return "kernels are not used"
    if limits.dim * limits.dtype.itemsize % 16:
        return f"a row of {limits.dim} values is not a multiple of 16 bytes"
    return ""


def peer_refusal() -> str:
    """Return why this rank does not try memory of other GPUs; empty if it does."""
    return "MGPU_NO_P2P=1" if os.environ.get("MGPU_NO_P2P") == "1" else ""


def can_quantize(limits: ReduceLimits, device: torch.device) -> bool:
    """Return whether this rank's kernels could quantize norms."""
    from mgpu.worker.kernels.runtime import has_float8

    return limits.dtype is torch.bfloat16 and has_float8(device)
