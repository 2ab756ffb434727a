"""Which layers live on which devices.

A plan is a tuple of stages. Tensor parallelism is one stage with N devices, layer mapping is N stages with one device
each, a hybrid is both. Ranks are numbered stage by stage.
"""

from dataclasses import dataclass
from typing import Literal

from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.protocol.model.expert_facts import ExpertFacts, ExpertSplit

Mode = Literal["cpu", "single", "tensor-parallel", "layer-mapped", "hybrid"]
Transport = Literal["none", "nccl", "gloo", "shared-memory", "peer", "pinned"]
_STEP, _COARSE = 16, 32
"""Uneven shares end at multiples of so many columns, if a KV head's share has at least so many."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers ``[first_layer, end_layer)`` split tensor-parallel over ``devices`` (visible ordinals).

    The first and the last stage may have no layers: then they are the embedding, or the norm and the head, alone.
    """

    first_layer: int
    end_layer: int
    devices: tuple[int, ...]
    shares: tuple[int, ...] = ()
    """KV heads of each device, where they differ; empty: all have equally many."""

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer


@dataclass(frozen=True, slots=True)
class RankPlace:
    """The position of one rank in a plan."""

    rank: int
    stage_index: int
    tp_rank: int
    tp_size: int
    device: int
    shares: tuple[int, ...] = ()

    @property
    def part(self) -> "TensorPart":
        """The part of each layer that the rank holds."""
        return TensorPart(self.tp_rank, self.tp_size, self.shares)


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """The layout of one model: contiguous stages in layer order."""

    stages: tuple[Stage, ...]

    @property
    def world_size(self) -> int:
        return sum(len(stage.devices) for stage in self.stages)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def place_of(self, rank: int) -> RankPlace:
        """Return a rank's stage and its position inside the stage. IndexError when there is no such rank."""
        first = 0
        for index, stage in enumerate(self.stages):
            if first <= rank < first + len(stage.devices):
                tp_rank = rank - first
                return RankPlace(rank, index, tp_rank, len(stage.devices), stage.devices[tp_rank], stage.shares)
            first += len(stage.devices)
        raise IndexError(f"rank {rank} is outside a plan of {self.world_size} ranks")

    def ranks_of_stage(self, stage_index: int) -> range:
        first = sum(len(stage.devices) for stage in self.stages[:stage_index])
        return range(first, first + len(self.stages[stage_index].devices))

    def ends_of(self, stage_index: int) -> tuple[bool, bool]:
        """Return whether a stage is the first, which embeds tokens, and whether it is the last, which has the head."""
        return stage_index == 0, stage_index == self.num_stages - 1

    @property
    def output_rank(self) -> int:
        """The rank that reports sampled tokens: the first of the last stage."""
        return self.ranks_of_stage(self.num_stages - 1)[0]


@dataclass(frozen=True, slots=True)
class HeadShard:
    """Half-open ranges of query and KV heads that one tensor-parallel rank computes.

    If ``kv_replicas`` > 1, this many consecutive ranks hold the same KV head.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    kv_replicas: int

    @property
    def num_q(self) -> int:
        return self.q_stop - self.q_start

    @property
    def num_kv(self) -> int:
        return self.kv_stop - self.kv_start


def head_shard(num_q_heads: int, num_kv_heads: int, tp_rank: int, tp_size: int) -> HeadShard:
    """Return the heads of one rank. The planner has checked that the sizes divide.

    With at most as many ranks as KV heads, each rank owns ``num_kv_heads / tp_size`` of them. With more ranks,
    ``tp_size / num_kv_heads`` consecutive ranks hold the same KV head.
    """
    num_q = num_q_heads // tp_size
    replicas = max(1, tp_size // num_kv_heads)
    num_kv = max(1, num_kv_heads // tp_size)
    kv_start = tp_rank // replicas * num_kv
    return HeadShard(tp_rank * num_q, (tp_rank + 1) * num_q, kv_start, kv_start + num_kv, replicas)


def key_head_range(linear: LinearFacts, tp_rank: int, tp_size: int) -> range:
    """Return the key heads of linear attention of one rank, which has their value heads too. They divide evenly."""
    count = linear.key_heads // tp_size
    return range(tp_rank * count, (tp_rank + 1) * count)


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """Round the vocabulary up so that every rank holds the same number of rows."""
    return -(-vocab_size // tp_size) * tp_size


def even_range(total: int, rank: int, size: int) -> range:
    """Return one rank's share of ``total`` items; shares differ by at most one."""
    return range(total * rank // size, total * (rank + 1) // size)


def block_range(total: int, rank: int, size: int, block: int) -> range:
    """Return one rank's share of ``total`` items in whole blocks; shares differ by at most one block."""
    blocks = even_range(-(-total // max(1, block)), rank, size)
    return range(blocks.start * max(1, block), min(total, blocks.stop * max(1, block)))


def shared_range(total: int, rank: int, shares: tuple[int, ...], step: int = 1) -> range:
    """Return one rank's items where shares differ, in whole steps but for the last rank's.

    Example: 14,336 columns in shares of 3, 3 and 2 are 5,376, 5,376 and 3,584 columns.
    """
    if step == 1 and total >= _COARSE * sum(shares):
        step = _STEP  # products are fastest where slices begin at multiples of this

    def bound(ranks: int) -> int:
        return total if ranks == len(shares) else round(total * sum(shares[:ranks]) / sum(shares) / step) * step

    return range(bound(rank), bound(rank + 1))


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Which part of each layer a rank of a stage holds: an equal one, or by shares in KV heads."""

    rank: int
    size: int
    shares: tuple[int, ...] = ()
    """KV heads of each rank; empty: all have equally many."""

    def heads(self, num_q_heads: int, num_kv_heads: int) -> HeadShard:
        """Return the rank's heads. With shares, no KV head is on two ranks."""
        if not self.shares:
            return head_shard(num_q_heads, num_kv_heads, self.rank, self.size)
        group = num_q_heads // num_kv_heads
        first = sum(self.shares[: self.rank])
        end = first + self.shares[self.rank]
        return HeadShard(first * group, end * group, first, end, 1)

    def columns(self, total: int, step: int = 1, block: int = 0) -> range:
        """Return the rank's columns of a feed-forward network, in whole steps if there are shares.

        Without shares they are in whole blocks of a GGUF file, if it is one.
        """
        if self.shares:
            return shared_range(total, self.rank, self.shares, step)
        return block_range(total, self.rank, self.size, block)

    def evenly(self, total: int) -> range:
        return even_range(total, self.rank, self.size)

    def vocabulary(self, vocab_size: int) -> tuple[range, ...]:
        """Return the rows of the vocabulary of each rank; without shares they are padded to equal lengths."""
        if self.shares:
            return tuple(shared_range(vocab_size, rank, self.shares) for rank in range(self.size))
        rows = padded_vocab(vocab_size, self.size) // self.size
        return tuple(range(rank * rows, (rank + 1) * rows) for rank in range(self.size))

    def experts(self, experts: ExpertFacts, split: ExpertSplit, step: int = 1) -> "ExpertShard":
        """Return a slice of every expert (tensor), or all of some experts (parallel)."""
        if split == "parallel":
            return ExpertShard(self.columns(experts.count), range(experts.width))
        return ExpertShard(range(experts.count), self.columns(experts.width, step))


@dataclass(frozen=True, slots=True)
class ExpertShard:
    """What one tensor-parallel rank holds of a layer's experts: which ones, and which columns of their width."""

    experts: range
    columns: range


def largest_expert_shard(experts: ExpertFacts, split: ExpertSplit, size: int) -> tuple[int, int]:
    """Return the most experts, and the most columns of their width, that one of ``size`` ranks holds."""
    if split == "parallel":
        return -(-experts.count // size), experts.width
    return experts.count, -(-experts.width // size)
