"""The layout of the memfd that the ranks of one machine share.

The orchestrator creates the file with `shared_layout(...).total_bytes`. Every worker computes the same layout from the
same plan, so nothing is negotiated. All offsets are in bytes. Counters are 64-bit; each has a cache line of its own and
one rank that writes it.
"""

from dataclasses import dataclass

from mgpu.protocol.model.facts import DTYPE_BYTES
from mgpu.protocol.model.layout import Layout, StepLimits

LINE = 64
"""Bytes of a cache line."""
PAGE = 4096
REDUCE_SLOT_BYTES = 1 << 20
"""Larger partial sums are added in parts of this size: two slots per rank fit into a core's cache."""
ACTIVATION_DEPTH = 2
"""Activations that may be unread at a stage boundary before the sender waits."""
HANDLE_BYTES = 1024
"""Room for one CUDA IPC handle."""


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
    return SharedLayout(failed, barrier, reduce, activations, feedback, space.take(0, PAGE))


def _reduce_region(space: _Allocator, size: int, message_bytes: int) -> ReduceRegion:
    slot_bytes = min(REDUCE_SLOT_BYTES, -(-message_bytes // PAGE) * PAGE) if size > 1 else 0
    counters = space.take(LINE * size)
    return ReduceRegion(counters, space.take(2 * size * slot_bytes, PAGE), slot_bytes, size)
