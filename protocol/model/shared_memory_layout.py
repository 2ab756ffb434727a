"""The layout of the memfd that the ranks of one machine share.

The orchestrator creates the file with `shared_layout(...).total_bytes`. Every worker computes the same layout from the
same plan, so nothing is negotiated. All offsets are in bytes. Counters are 64-bit; each has a cache line of its own and
one rank that writes it.
"""

import platform
from dataclasses import dataclass

from mgpu.protocol.model.facts import DTYPE_BYTES
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import PlacementPlan

LINE = 64
"""Bytes of a cache line."""
PAGE = 4096
REDUCE_SLOT_BYTES = 1 << 20
"""Larger partial sums are added in parts of this size: two slots per rank fit into a core's cache."""
ACTIVATION_DEPTH = 2
"""Activations that may be unread at a stage boundary before the sender waits."""
HANDLE_BYTES = 1024
"""Room for one CUDA IPC handle."""
RELAY_ROWS = 2048
"""Most rows of a step whose activations kernels pass on. Longer steps go through the channels."""
SUM_ROWS = 512
"""Most rows that kernels of the ranks of a stage add up: as many as the largest graph with prompts has."""
_SUM_BYTES = 8 << 20
"""Most bytes of a message of all ranks through host memory: beyond it a library is faster."""
_SUM_HALVES, _SUM_ALIGNMENT = 2, 256
_LETTER_BYTES = 8


def orders_stores() -> bool:
    """Return True if this machine's plain stores are seen in their order, which readers of the file rely on."""
    return platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True, slots=True)
class ReduceRegion:
    """Where the ``size`` ranks of one stage add up partial sums: a counter per rank, then two slots per rank."""

    counters: int
    slots: int
    slot_bytes: int
    size: int


@dataclass(frozen=True, slots=True)
class ChannelRegion:
    """A ring with one sender and one receiver: counters of sent and received messages, then ``depth`` slots."""

    sent: int
    received: int
    handle: int
    """`HANDLE_BYTES` in which the receiver of a CUDA IPC channel publishes its buffer."""
    slots: int
    slot_bytes: int
    depth: int


@dataclass(frozen=True, slots=True)
class HostRegion:
    """Host memory that stands in for a rank's GPU memory where the GPUs that write to it cannot reach that."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RelaySizes:
    """What kernels pass between stages: activations of ``rows`` rows, ``depth`` steps at once; a letter per row."""

    rows: int
    depth: int
    inbox_bytes: int
    """Of a rank of any stage but the first."""
    mailbox_bytes: int
    """Of a rank of the first stage."""


@dataclass(frozen=True, slots=True)
class SharedLayout:
    """The whole file. A rank that fails sets the word at ``failed``, so that no peer waits for it to the deadline."""

    failed: int
    barrier: int
    """One counter per rank of the plan."""
    reduce: tuple[ReduceRegion, ...]
    """One per stage."""
    activations: tuple[tuple[ChannelRegion, ...], ...]
    """``activations[s][j]``: to rank j of stage s + 1."""
    feedback: tuple[ChannelRegion, ...]
    """Sampled tokens, to rank j of stage 0; empty for a single stage."""
    world: ReduceRegion
    """Where all ranks of the plan meet before they have any other way to talk."""
    relay: tuple[HostRegion, ...]
    """One per rank; empty for a single stage."""
    sums: tuple[tuple[HostRegion, ...], ...]
    """``sums[s][j]``: of rank j of stage s, for partial sums by kernels. Empty where no GPUs share a stage's layers."""
    total_bytes: int


class _Allocator:
    def __init__(self) -> None:
        self.used = 0

    def take(self, nbytes: int, align: int = LINE) -> int:
        offset = -(-self.used // align) * align
        self.used = offset + nbytes
        return offset

    def channel(self, slot_bytes: int, depth: int) -> ChannelRegion:
        sent, received, handle = self.take(LINE), self.take(LINE), self.take(HANDLE_BYTES)
        slot_bytes = -(-slot_bytes // PAGE) * PAGE  # whole pages: CUDA pins memory by the page
        return ChannelRegion(sent, received, handle, self.take(depth * slot_bytes, PAGE), slot_bytes, depth)


def shared_layout(layout: Layout, limits: StepLimits, hidden_size: int) -> SharedLayout:
    """Lay out reductions of every stage and channels of every boundary; a pure function of its arguments."""
    space, plan = _Allocator(), layout.placement
    failed, barrier = space.take(LINE), space.take(LINE * plan.world_size)
    message_bytes = limits.max_batch_tokens * hidden_size * DTYPE_BYTES[layout.dtype]
    reduce = tuple(_reduce_region(space, len(stage.devices), message_bytes) for stage in plan.stages)
    activations = tuple(
        tuple(space.channel(message_bytes, ACTIVATION_DEPTH) for _ in stage.devices) for stage in plan.stages[1:]
    )
    # Tokens of one step per stage can be unread, and of one more while the next step samples.
    receivers = plan.stages[0].devices if plan.num_stages > 1 else ()
    feedback = tuple(space.channel(4 * limits.max_rows, plan.num_stages + 2) for _ in receivers)
    world = ReduceRegion(space.take(LINE * plan.world_size), space.take(2 * plan.world_size * PAGE, PAGE), PAGE,
                         plan.world_size)  # fmt: skip
    relay = _relay_regions(space, plan, relay_sizes(layout, limits, hidden_size)) if plan.num_stages > 1 else ()
    sums = tuple(_sum_regions(space, len(stage.devices), layout, hidden_size) for stage in plan.stages)
    return SharedLayout(failed, barrier, reduce, activations, feedback, world, relay, sums, space.take(0, PAGE))


def host_sum_rows(ranks: int, hidden_size: int, element_bytes: int) -> int:
    """Return how many rows kernels can add up through host memory."""
    return max(1, min(SUM_ROWS, _SUM_BYTES // (ranks * hidden_size * element_bytes)))


def _sum_regions(space: _Allocator, ranks: int, layout: Layout, hidden_size: int) -> tuple[HostRegion, ...]:
    """Return a region per rank, for the areas of worker/kernels/peers/memory.py: pairs of score and id, and sums."""
    if ranks == 1 or layout.transport not in ("nccl", "gloo"):
        return ()
    element_bytes = DTYPE_BYTES[layout.dtype]
    rows = host_sum_rows(ranks, hidden_size, element_bytes)
    areas = ranks * 2 * SUM_ROWS * 4, ranks * rows * hidden_size * element_bytes
    nbytes = sum(-(-_SUM_HALVES * area // _SUM_ALIGNMENT) * _SUM_ALIGNMENT for area in areas)
    nbytes = -(-nbytes // PAGE) * PAGE
    return tuple(HostRegion(space.take(nbytes, PAGE), nbytes) for _ in range(ranks))


def relay_sizes(layout: Layout, limits: StepLimits, hidden_size: int) -> RelaySizes:
    """Return the sizes of the relay. One step per stage and one more can be in flight: each needs a place."""
    rows, depth = min(RELAY_ROWS, limits.max_batch_tokens), layout.placement.num_stages + 2
    inbox_bytes = depth * rows * hidden_size * DTYPE_BYTES[layout.dtype]
    return RelaySizes(rows, depth, inbox_bytes, _LETTER_BYTES * limits.max_rows)


def _relay_regions(space: _Allocator, plan: PlacementPlan, sizes: RelaySizes) -> tuple[HostRegion, ...]:
    regions = []
    for rank in range(plan.world_size):
        is_first = plan.place_of(rank).stage_index == 0
        nbytes = -(-(sizes.mailbox_bytes if is_first else sizes.inbox_bytes) // PAGE) * PAGE
        regions.append(HostRegion(space.take(nbytes, PAGE), nbytes))
    return tuple(regions)


def _reduce_region(space: _Allocator, size: int, message_bytes: int) -> ReduceRegion:
    slot_bytes = min(REDUCE_SLOT_BYTES, -(-message_bytes // PAGE) * PAGE) if size > 1 else 0
    counters = space.take(LINE * size)
    return ReduceRegion(counters, space.take(2 * size * slot_bytes, PAGE), slot_bytes, size)
