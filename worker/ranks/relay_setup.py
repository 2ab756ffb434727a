"""Open a `Relay` between the stages of one machine: agree, allocate, map, empty, try. All ranks use it, or none does.

Ranks of the first stage have a mailbox for tokens, all others an inbox for activations. Where a GPU that writes to it
cannot reach it, it is in the file that all ranks share, pinned: kernels then write and wait over the bus, by the same
protocol. Ranks decide that together, since sender and receiver must mean the same place:

    step       rank 0 (stage 0)                 rank 1 (stage 1)                 agreed
    allocate   a mailbox and its handle         an inbox and its handle          no problem; handles are exchanged
    map        "cannot reach rank 1"            rank 0's mailbox is mapped       rank 1's inbox moves to the file
    try        sends rows, fetches tokens       receives rows, posts tokens      all data as sent: the relay is used
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.placement import RankPlace
from mgpu.protocol.model.shared_memory_layout import SharedLayout, relay_sizes
from mgpu.worker.kernels.peers.activations import ActivationReceiver, ActivationSender, InboxShape
from mgpu.worker.kernels.peers.memory import PeerAlarm
from mgpu.worker.kernels.peers.token_mail import Mailbox, Postman
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.ranks.agreement import CannotUse, RankStatus, exchange, gpu_of, leave_in_order
from mgpu.worker.ranks.cuda_ipc import MappedMemory, export, map_exported
from mgpu.worker.ranks.host_channel import pin
from mgpu.worker.ranks.relay import Relay
from mgpu.worker.ranks.relay_check import load_kernels, relay_problem
from mgpu.worker.ranks.shared_memory import SharedMemoryGroup, SharedSegment

SWITCH = "MGPU_STAGE_RELAY"
"""0: never use a relay. 1: use it also if ranks share a GPU; there waiting kernels take turns: for tests only."""
_CHECK_S = 10.0
"""Longest wait of a kernel while the relay is tried: all kernels are loaded by then."""


class RelaySetup:
    """Opens a relay and owns its memory: this rank's own and the mappings of the others'."""

    def __init__(
        self, spec: WorkerSpec, place: RankPlace, segment: SharedSegment, layout: SharedLayout, device: torch.device
    ) -> None:
        self._spec = spec
        self._plan = spec.layout.placement
        self._place = place
        self._segment = segment
        self._regions = layout.relay
        self._world = SharedMemoryGroup(segment, layout.world, place.rank, range(self._plan.world_size))
        self._device = device
        self._sizes = relay_sizes(spec.layout, spec.limits, spec.facts.hidden_size)
        self._mine: Tensor | None = None
        self._mapped: dict[int, MappedMemory] = {}
        self._pinned: set[int] = set()
        self.note = ""
        """A line for the start-up log: what is used, or why not."""

    def open(self) -> Relay | None:
        """Return this rank's ends; None if any rank cannot use a relay. PeerLost when a rank is gone."""
        try:
            relay = self._open()
        except CannotUse as reason:
            self._unmap()
            self._mine = None
            self.note = f"activations do not go by own kernels: {reason}"
            return None
        return relay

    def _open(self) -> Relay:
        handle = self._allocate()
        statuses = self._agree(*handle)
        self._refuse_shared_gpus(statuses)
        statuses = self._agree("", unreachable=self._map_all(statuses))
        in_file = {rank for status in statuses for rank in status.unreachable}
        self._agree(self._try(lambda: self._move_to_file(in_file)))
        way = "peer memory" if not in_file else "pinned host memory"
        self.note = f"activations of up to {self._sizes.rows} tokens and chosen tokens go by own kernels over {way}"
        failed = torch.zeros(1, dtype=torch.int32, device=self._device)
        seen = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._clear(in_file)
        self._agree("")  # no rank writes before all memory is empty
        turns = self._turns()
        trial = self._relay(PeerAlarm(failed, seen, int(_CHECK_S * 1e6)), in_file, turns)
        self._agree(self._try(lambda: load_kernels(trial, self._device)))
        self._agree(self._try(lambda: relay_problem(trial, self._device)))
        timeout_us = int(self._spec.worker_timeout_s * 1e6)
        return self._relay(PeerAlarm(failed, seen, timeout_us), in_file, turns)

    def _try(self, act: Callable[[], str]) -> str:
        """Return what ``act`` found wrong, or the first line of its error."""
        try:
            return act()
        except Exception as error:  # a compiler's or driver's failure may be of any type; channels still serve
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    # -- memory --------------------------------------------------------------------------------------------------------

    def _allocate(self) -> tuple[str, bytes]:
        """Allocate this rank's memory; return the problem, or nothing, and the handle for its peers."""
        if problem := refusal(self._spec, self._device):
            return problem, b""
        try:
            nbytes = self._regions[self._place.rank].nbytes
            self._mine = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            return "", b"" if os.environ.get("MGPU_NO_P2P") == "1" else export(self._mine)
        except RuntimeError as error:  # CUDA's, out of memory included: a server without a relay still works
            return f"memory cannot be shared: {str(error).splitlines()[0]}", b""

    def _refuse_shared_gpus(self, statuses: list[RankStatus]) -> None:
        gpus = [status.gpu for status in statuses]
        if len(set(gpus)) < len(gpus) and os.environ.get(SWITCH) != "1":
            raise CannotUse("ranks share a GPU")

    def _map_all(self, statuses: list[RankStatus]) -> tuple[int, ...]:
        """Map the memory of the ranks that this one writes to; return those that it cannot reach."""
        unreachable = []
        for rank in {*self._receivers(), *self._readers_of_tokens()}:
            try:
                self._map(rank, statuses[rank])
            except (CannotUse, RuntimeError):
                unreachable.append(rank)
        return tuple(unreachable)

    def _map(self, rank: int, status: RankStatus) -> None:
        place = self._plan.place_of
        pair, layout = (self._place.rank, rank), self._spec.layout
        if not status.handle or pair in layout.staged or pair in layout.broken:
            raise CannotUse(f"no peer access between GPUs {self._place.device} and {place(rank).device}")
        is_other = status.gpu != gpu_of(self._device)
        is_visible = status.index != self._device.index and status.index < torch.cuda.device_count()
        if is_other and is_visible and not torch.cuda.can_device_access_peer(self._device, status.index):
            raise CannotUse(f"no peer access between GPUs {self._device.index} and {status.index}")
        self._mapped[rank] = map_exported(status.handle, self._device)

    def _move_to_file(self, in_file: set[int]) -> str:
        """Pin the parts of the shared file that this rank reads or writes."""
        for rank in in_file & {self._place.rank, *self._receivers(), *self._readers_of_tokens()}:
            region = self._regions[rank]
            pin(self._segment.view(region.start, region.nbytes, torch.uint8))
        if self._place.rank in in_file:
            self._mine = self._segment.view(
                self._regions[self._place.rank].start, self._regions[self._place.rank].nbytes, torch.uint8
            )
        return ""

    def _address(self, rank: int, in_file: set[int]) -> int:
        if rank in in_file:
            return self._segment.data.data_ptr() + self._regions[rank].start
        if rank == self._place.rank:
            assert self._mine is not None
            return self._mine.data_ptr()
        return self._mapped[rank].memory.data_ptr()

    def _clear(self, in_file: set[int]) -> None:
        assert self._mine is not None
        if self._is_first:
            self._mine.zero_()
        else:
            self._shape().clear(self._mine[: self._sizes.inbox_bytes])
        torch.cuda.synchronize(self._device)

    # -- ends ----------------------------------------------------------------------------------------------------------

    @property
    def _is_first(self) -> bool:
        return self._place.stage_index == 0

    @property
    def _is_last(self) -> bool:
        return self._place.stage_index == self._plan.num_stages - 1

    def _receivers(self) -> tuple[int, ...]:
        """List the ranks of the next stage that read from this one; links.py has the rule."""
        return () if self._is_last else self._served(self._plan.ranks_of_stage(self._place.stage_index + 1))

    def _readers_of_tokens(self) -> tuple[int, ...]:
        return self._served(self._plan.ranks_of_stage(0)) if self._is_last else ()

    def _served(self, readers: range) -> tuple[int, ...]:
        place = self._place
        return tuple(rank for index, rank in enumerate(readers) if index % place.tp_size == place.tp_rank)

    def _shape(self) -> InboxShape:
        spec = self._spec
        dtype: torch.dtype = getattr(torch, spec.layout.dtype)
        return InboxShape(self._sizes.rows, spec.facts.hidden_size, self._sizes.depth, dtype)

    def _turns(self) -> tuple[Tensor, Tensor]:
        """Return the counters of a sender and a receiver, which a trial and the relay after it share."""
        sent, received = torch.zeros((2, self._sizes.rows), dtype=torch.int32, device=self._device)
        return sent, received

    def _relay(self, alarm: PeerAlarm, in_file: set[int], turns: tuple[Tensor, Tensor]) -> Relay:
        shape, own = self._shape(), self._address(self._place.rank, in_file)

        def addresses(ranks: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(self._address(rank, in_file) for rank in ranks)

        return Relay(
            self._place.rank,
            self._sizes.rows,
            alarm,
            send=None if self._is_last else ActivationSender(shape, addresses(self._receivers()), turns[0]),
            receive=None if self._is_first else ActivationReceiver(shape, own, turns[1], alarm),
            mailbox=Mailbox(own, alarm) if self._is_first else None,
            post=Postman(addresses(self._readers_of_tokens())) if self._is_last else None,
        )

    # -- agreement -----------------------------------------------------------------------------------------------------

    def _agree(self, problem: str, handle: bytes = b"", unreachable: tuple[int, ...] = ()) -> list[RankStatus]:
        """Tell all ranks how this one is doing, and return what they say. CannotUse if one has a problem."""
        statuses = exchange(self._world, self._device, problem, handle, unreachable)
        if problems := [f"rank {rank}: {status.problem}" for rank, status in enumerate(statuses) if status.problem]:
            raise CannotUse("; ".join(problems))
        return statuses

    def close(self) -> None:
        """Unmap when no rank writes any more, then free when no rank has this memory mapped."""
        if self._mine is not None:
            leave_in_order(self._world, self._device, self._unmap)
            self._mine = None

    def _unmap(self) -> None:
        while self._mapped:
            self._mapped.popitem()[1].unmap()


def refusal(spec: WorkerSpec, device: torch.device) -> str:
    """Return why this rank does not try a relay; empty if it does."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if not uses_kernels(device):
        return "kernels are not used"
    dtype: torch.dtype = getattr(torch, spec.layout.dtype)
    if spec.facts.hidden_size * dtype.itemsize % 16:
        return f"a row of {spec.facts.hidden_size} values is not a multiple of 16 bytes"
    return ""
