"""Which steps run as CUDA graphs, and which graphs are there from the start."""

from typing import TYPE_CHECKING, Optional

import torch

from mgpu.protocol.internal.worker_messages import StepPlan
from mgpu.worker.models.build import DecoderStage
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.ranks.peer_group import PeerGroup, peers_of
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable

if TYPE_CHECKING:
    from mgpu.worker.steps.graph_pool import GraphPool, StepOutput

_FIRST_DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FIRST_PROMPTS = ((512, 8, False), (256, 8, False), (128, 8, False), (64, 8, False))
"""Sizes of graphs that are there when the worker is ready; others are made when first needed, in about 50 ms."""


def make_graphs(stage: DecoderStage, cache: KvCache, rows: RowTable, group: TensorParallelGroup) -> Optional["Graphs"]:
    """Give the graphs of a rank that has all layers; None where its steps are not made of kernels.

    Sums over ranks are captured where own kernels make them, which wait for peers on the GPU. All ranks get the same
    plans, so they make and replay the same graphs in the same order.
    """
    peers = peers_of(group)
    if group.size > 1 and peers is None:
        return None
    return Graphs(stage, cache, rows, peers) if _all(stage.has_kernels, group, rows.device) else None


def _all(value: bool, group: TensorParallelGroup, device: torch.device) -> bool:
    """Say whether it is so on every rank: one whose kernels failed its check must not go another way than its peers."""
    if group.size == 1:
        return value
    return bool(group.all_gather(torch.tensor([value], dtype=torch.uint8, device=device)).all())


def prepare_graphs(stage: DecoderStage, cache: KvCache, rows: RowTable) -> None:
    """Launch all that the first graphs launch, and capture none."""
    from mgpu.worker.steps.graph_pool import Uncaptured

    Graphs(stage, cache, rows, None, Uncaptured).prepare()


class Graphs:
    """All graphs of one worker."""

    def __init__(
        self,
        stage: DecoderStage,
        cache: KvCache,
        rows: RowTable,
        peers: PeerGroup | None,
        pool_type: type["GraphPool"] | None = None,
    ) -> None:
        from mgpu.worker.steps.decode_graphs import DecodeGraphs, graph_size, staged_length
        from mgpu.worker.steps.graph_pool import GraphPool
        from mgpu.worker.steps.prompt_graphs import MOST_STAGED, PromptGraphs

        self._rows = rows
        self._most_rows = 2 * rows.max_rows if peers is None else min(2 * rows.max_rows, peers.most_rows + 1)
        pool = (pool_type or GraphPool)(rows.device, max(MOST_STAGED, staged_length(graph_size(rows.max_rows))))
        self._decode = DecodeGraphs(pool, stage, cache, rows, peers)
        self._prompts = PromptGraphs(pool, stage, cache, rows, peers)

    def run(self, plan: StepPlan) -> Optional["StepOutput"]:
        """Apply and launch a step; None, with nothing done, where no graph serves it."""
        if self._decode.takes(plan):
            return self._decode.run(plan, self._rows.apply_decode(plan))
        if self._prompts.takes(plan):
            self._rows.apply(plan)
            self._rows.check(plan)
            return self._prompts.run(plan)
        return None

    def prepare(self) -> None:
        """Make the first graphs, the largest first: smaller ones fit into its memory."""
        for size in reversed(_FIRST_DECODE):
            if size < self._most_rows:
                self._decode.prepare(size)
        for prompts in _FIRST_PROMPTS:
            if prompts[0] <= self._prompts.most_tokens:
                self._prompts.prepare(prompts)
