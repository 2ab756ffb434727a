"""Connect one rank to the others as its spec says.

Between stages, rank j of a stage sends to every rank i of the next one with ``i % size == j``, where ``size`` counts
the senders. All ranks of a stage hold the same activations, so stages of different sizes fit together. From 2 to 4
ranks, rank 0 sends to ranks 0 and 2, rank 1 to ranks 1 and 3. From 4 to 2, ranks 2 and 3 send nothing. Sampled tokens
go from the last stage to the first likewise. On GPUs a `Relay` (relay.py) carries both, by the same rule; channels are
left with the activations of long steps.

Inside a stage of several GPUs, `Links.group` is a stack. Each group passes on what it does not do itself:

    MeasurableGroup     nothing itself, except while start-up runs this rank alone
      PeerGroup         sums of up to `most_rows` tokens by own kernels over peer memory, or through pinned host
                        memory where that is quicker than NCCL; else absent
        DistGroup       NCCL; without NCCL, a ThroughHost around a DistGroup that uses gloo

    embedding           all_reduce of the stack: PeerGroup's kernel up to `most_rows` tokens, else NCCL
    layers              `peers_of` takes the PeerGroup out of the stack; its kernel adds up within the next norm
    long prompts        more tokens than `most_rows`: all_reduce of the stack, which NCCL does
    choice of tokens    `PeerGroup.exchange` in a CUDA graph; without a PeerGroup or a graph all_gather, by NCCL

On one GPU the stack is a MeasurableGroup around a SingleRank; on the CPU, around a SharedMemoryGroup or a DistGroup.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgpu.protocol.internal.process.child import BadSpec
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.placement import Transport
from mgpu.protocol.model.shared_memory_layout import ChannelRegion, SharedLayout, shared_layout
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.ranks.capture_check import capture_problem
from mgpu.worker.ranks.collectives import (
    Channel,
    DistChannel,
    DistGroup,
    MeasurableGroup,
    SingleRank,
    TensorParallelGroup,
    ThroughHost,
    leave_process_group,
    new_groups,
    start_process_group,
)
from mgpu.worker.ranks.gpu_channel import GpuReceiver, GpuSender
from mgpu.worker.ranks.host_channel import HostChannel
from mgpu.worker.ranks.peer_group import MOST_RANKS, ReduceLimits
from mgpu.worker.ranks.peer_setup import HostMemory, PeerSetup
from mgpu.worker.ranks.shared_memory import SharedMemoryGroup, SharedSegment

if TYPE_CHECKING:
    from mgpu.worker.ranks.relay import Relay
    from mgpu.worker.ranks.relay_setup import RelaySetup

START_TIMEOUT_S = 180.0
"""Least time for all ranks to import torch and meet: many of them may share few cores."""
_TOKENS_TAG = 1


@dataclass(slots=True)
class Links:
    """One rank's links to the others. Messages of one link arrive in the order of steps."""

    group: MeasurableGroup
    upstream: Channel | None = None
    downstream: tuple[Channel, ...] = ()
    tokens_from: Channel | None = None
    tokens_to: tuple[Channel, ...] = ()
    segment: SharedSegment | None = None
    notes: list[str] = field(default_factory=list)
    """Lines for the start-up log."""
    peer_setup: PeerSetup | None = None
    """Owner of the memory behind ``group``, if that adds up by own kernels."""
    relay: "Relay | None" = None
    """Passes between stages by kernels whatever it takes; None: everything goes through the channels."""
    relay_setup: "RelaySetup | None" = None
    """Owner of the memory behind ``relay``."""

    def send(self, x_TD: Tensor) -> None:
        """Send activations to the ranks of the next stage that read from this one."""
        for channel in self.downstream:
            channel.send(x_TD)

    def recv(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Wait for the activations of the previous stage, [T, D]."""
        assert self.upstream is not None, "the first stage embeds tokens"
        return self.upstream.recv((num_tokens, hidden_size), dtype)

    def send_tokens(self, ids_S: Tensor) -> None:
        """Send sampled tokens, int32 [S], from the last stage to the first."""
        for channel in self.tokens_to:
            channel.send(ids_S)

    def recv_tokens(self, count: int) -> Tensor:
        """Wait for sampled tokens, int32 [S], of the last stage."""
        assert self.tokens_from is not None, "only the first of several stages receives tokens"
        return self.tokens_from.recv((count,), torch.int32)

    def close(self) -> None:
        """Part from the other ranks in good order; all of them must call this."""
        if self.relay_setup is not None:
            self.relay_setup.close()
        if self.peer_setup is not None:
            self.peer_setup.close()
        leave_process_group()

    def report_failure(self) -> None:
        """End the waits of peers for this rank at once, if they share memory; else they end at their deadline."""
        if self.segment is not None:
            self.segment.report_failure()


def connect(spec: WorkerSpec, rank: int, device: torch.device) -> Links:
    """Meet the other ranks and open this rank's links. PeerLost when a rank does not come."""
    if spec.layout.placement.world_size == 1:
        return Links(MeasurableGroup(SingleRank()))
    return _Connector(spec, rank, device).connect()


class _Connector:
    """Opens the links of one rank, once."""

    def __init__(self, spec: WorkerSpec, rank: int, device: torch.device) -> None:
        self.spec = spec
        self.placement = spec.layout.placement
        self.place = self.placement.place_of(rank)
        self.device = device
        self.notes: list[str] = []
        self.peer_setup: PeerSetup | None = None
        self.shared = layout_of(spec) if spec.shared_fd >= 0 else None
        self.segment = _open_segment(spec, self.shared, rank) if self.shared is not None else None

    def connect(self) -> Links:
        start_s = max(START_TIMEOUT_S, self.spec.worker_timeout_s)
        stage, last = self.place.stage_index, self.placement.num_stages - 1
        self._join_process_group(start_s)
        group = self._stage_group()
        if self.segment is not None:
            self.segment.barrier(self.placement.world_size, start_s)
        relay_setup = self._relay_setup()
        return Links(
            group=MeasurableGroup(group),
            upstream=self._activations(stage - 1, stage)[0] if stage > 0 else None,
            downstream=self._activations(stage, stage + 1) if stage < last else (),
            tokens_from=self._tokens(last)[0] if stage == 0 < last else None,
            tokens_to=self._tokens(last) if stage == last > 0 else (),
            segment=self.segment,
            notes=self.notes,
            peer_setup=self.peer_setup,
            relay=self._open_relay(relay_setup),
            relay_setup=relay_setup,
        )

    def _relay_setup(self) -> "RelaySetup | None":
        """Return what opens a relay between the stages; None on the CPU, and for a single stage."""
        if self.device.type != "cuda" or self.segment is None or self.shared is None or not self.shared.relay:
            return None
        if self.spec.layout.cpu_ranks:
            return None  # no kernel can wait for a CPU worker
        if not uses_kernels(self.device):
            return None  # on every rank alike: they are of one machine and one environment
        from mgpu.worker.ranks.relay_setup import RelaySetup

        return RelaySetup(self.spec, self.place, self.segment, self.shared, self.device)

    def _open_relay(self, setup: "RelaySetup | None") -> "Relay | None":
        relay = None if setup is None else setup.open()
        if setup is not None and self.place.rank == 0:
            self.notes.append(setup.note)
        return relay

    def _join_process_group(self, start_s: float) -> None:
        """Join torch.distributed if any transport needs it."""
        spec, joined = self.spec, self.spec.joined
        transports = {spec.layout.transport, spec.layout.stage_transport}
        if transports & {"gloo", "nccl"}:
            start_process_group(
                spec.rendezvous,
                self.place.rank,
                self.placement.world_size,
                nccl_device=self.device if "nccl" in transports else None,
                start_s=start_s,
                timeout_s=spec.worker_timeout_s,
                meeting="ranks" if joined is None else joined.meeting,
                opens_store=None if joined is None else joined.opens_store,
            )

    def _stage_group(self) -> TensorParallelGroup:
        """Return the group of this rank's stage."""
        transport, place = self.spec.layout.transport, self.place
        stages = [self.placement.ranks_of_stage(index) for index in range(self.placement.num_stages)]
        own = None
        if transport in ("gloo", "nccl") and max(map(len, stages)) > 1:
            own = new_groups(stages, self.spec.worker_timeout_s)[place.stage_index]  # all ranks make all groups
        if place.tp_size == 1:
            return SingleRank()
        in_memory = transport == "shared-memory" or place.rank in self.spec.layout.cpu_ranks
        if own is not None and not in_memory:
            group: TensorParallelGroup = DistGroup(own, place.tp_rank, place.tp_size)
        elif in_memory and self.segment is not None and self.shared is not None:
            region = self.shared.reduce[place.stage_index]
            group = SharedMemoryGroup(self.segment, region, place.tp_rank, stages[place.stage_index])
        else:
            raise BadSpec(f"a stage of {place.tp_size} ranks cannot use transport {transport!r} without a memfd")
        if self.device.type != "cuda":
            return group
        return self._with_kernels(group if transport == "nccl" else ThroughHost(group), host_group=group)

    def _with_kernels(self, group: TensorParallelGroup, host_group: TensorParallelGroup) -> TensorParallelGroup:
        """Let own kernels make the sums that they can, if all ranks of the stage reach each other's memory."""
        spec = self.spec
        if group.size > MOST_RANKS or not self._is_on_one_host():
            self._prepare_library(group)
            return group
        memory, broken = self._host_memory(), self._broken_peers()
        self.peer_setup = setup = PeerSetup(
            group, host_group, self.device, memory, broken, wants_float8=spec.layout.quant == "fp8"
        )
        limits = ReduceLimits.of(group.size, spec.facts.hidden_size, getattr(torch, spec.layout.dtype))
        opened = setup.open(limits, spec.worker_timeout_s)
        self._prepare_library(group, is_all=opened is group)
        if opened is group:
            opened = setup.open_on_host(limits, spec.worker_timeout_s)
        self._note(setup.note)
        return opened

    def _is_on_one_host(self) -> bool:
        """Return True if no rank of this stage is on another host, whose memory no kernel reaches."""
        joined, ranks = self.spec.joined, self.placement.ranks_of_stage(self.place.stage_index)
        return joined is None or len({joined.hosts[rank] for rank in ranks}) == 1

    def _prepare_library(self, group: TensorParallelGroup, is_all: bool = True) -> None:
        """Let NCCL open its connections, and find out whether graphs can have its sums if it makes them all."""
        if not isinstance(group, DistGroup):
            return
        self._warm_up(group)
        if is_all:
            problem = "workers have hung before"
            if self.spec.captures_library:
                problem = capture_problem(group, self.device, self.spec.worker_timeout_s)
            group.is_capturable = not problem
            if problem:
                self._note(f"sums of NCCL are not captured: {problem}")

    def _broken_peers(self) -> frozenset[int]:
        """Return the ranks of this stage whose memory must not be mapped, as numbers within the stage."""
        ranks = self.placement.ranks_of_stage(self.place.stage_index)
        broken = self.spec.layout.broken
        return frozenset(index for index, rank in enumerate(ranks) if (self.place.rank, rank) in broken)

    def _host_memory(self) -> HostMemory | None:
        """Return where kernels of this stage can add up if GPUs do not reach each other."""
        if self.segment is None or self.shared is None or not self.shared.sums[self.place.stage_index]:
            return None
        return HostMemory(self.segment, self.shared.sums[self.place.stage_index])

    def _note(self, text: str) -> None:
        if self.place.tp_rank == 0:
            self.notes.append(text)

    def _warm_up(self, group: TensorParallelGroup) -> None:
        """Let NCCL open its connections now: its first use may otherwise be in a user's long prompt."""
        shape = self.spec.limits.max_batch_tokens, self.spec.facts.hidden_size
        x_TD = torch.zeros(shape, dtype=getattr(torch, self.spec.layout.dtype), device=self.device)
        group.all_reduce(x_TD)
        group.all_gather(x_TD[:1])
        torch.cuda.synchronize(self.device)

    def _activations(self, sender: int, receiver: int) -> tuple[Channel, ...]:
        regions = self.shared.activations[sender] if self.shared is not None else None
        return self._channels(sender, receiver, regions, self.spec.layout.stage_transport, tag=0)

    def _tokens(self, last: int) -> tuple[Channel, ...]:
        # Token ids are few and the host needs them anyway, so they go through shared memory where there is any.
        if self.shared is not None:
            return self._channels(last, 0, self.shared.feedback, "shared-memory", tag=_TOKENS_TAG)
        return self._channels(last, 0, None, "gloo", tag=_TOKENS_TAG)

    def _channels(
        self, sender: int, receiver: int, regions: Sequence[ChannelRegion] | None, transport: Transport, tag: int
    ) -> tuple[Channel, ...]:
        """Open this rank's ends between two stages: one as a receiver, none or several as a sender."""
        senders, receivers = self.placement.ranks_of_stage(sender), self.placement.ranks_of_stage(receiver)
        sends = self.place.stage_index == sender
        channels = []
        for j, to_rank in enumerate(receivers):
            from_rank = senders[j % len(senders)]
            if self.place.rank == (from_rank if sends else to_rank):
                peer = to_rank if sends else from_rank
                pair = pair_transport(self.spec, transport, from_rank, to_rank)
                channels.append(self._channel(peer, regions[j] if regions else None, pair, tag, sends))
        return tuple(channels)

    def _channel(self, peer: int, region: ChannelRegion | None, transport: Transport, tag: int, sends: bool) -> Channel:
        if transport in ("gloo", "nccl"):
            wire = self.device if transport == "nccl" else torch.device("cpu")
            return DistChannel(peer, tag, self.device, wire)
        if region is None or self.segment is None:
            raise BadSpec(f"stage transport {transport!r} needs the memfd that only one machine's ranks can share")
        name = f"rank {peer}"
        if transport == "peer" and self.device.type == "cuda":
            return (GpuSender if sends else GpuReceiver)(self.segment, region, self.device, name)
        if sends and tag != _TOKENS_TAG and self.device.type == "cuda":
            self.notes.append(f"activations from rank {self.place.rank} to rank {peer} go through pinned host memory")
        return HostChannel(self.segment, region, self.device, name)


def pair_transport(spec: WorkerSpec, transport: Transport, sender: int, receiver: int) -> Transport:
    """Return the transport between two ranks: that of their stages, or through the host if their GPUs are no peers."""
    return "pinned" if transport == "peer" and (sender, receiver) in spec.layout.staged else transport


def layout_of(spec: WorkerSpec) -> SharedLayout:
    """Return the layout of the shared file, as the orchestrator computed it."""
    return shared_layout(spec.layout, spec.limits, spec.facts.hidden_size)


def _open_segment(spec: WorkerSpec, layout: SharedLayout, rank: int) -> SharedSegment:
    if spec.shared_bytes < layout.total_bytes:
        raise BadSpec(f"the shared file has {spec.shared_bytes} bytes; the plan needs {layout.total_bytes}")
    return SharedSegment(spec.shared_fd, layout, rank, spec.worker_timeout_s)
