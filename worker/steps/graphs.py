"""Which steps run as CUDA graphs, and which graphs are made before the first request."""

import logging
from typing import TYPE_CHECKING, Optional

import torch

from mgpu.protocol.internal.worker_messages import StepPlan
from mgpu.worker.models.build import DecoderStage
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.ranks.peer_group import captured_rows
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable

if TYPE_CHECKING:
    from mgpu.worker.ranks.relay import Relay
    from mgpu.worker.steps.graph_pool import StepOutput

log = logging.getLogger(__name__)

_FIRST_DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FIRST_PROMPTS = ((512, 8, False), (256, 8, False), (128, 8, False), (64, 8, False))
"""Sizes of the graphs that a ready worker has. Others are made when first needed, in about 50 ms."""


def make_graphs(
    stage: DecoderStage, cache: KvCache, rows: RowTable, group: TensorParallelGroup, relay: Optional["Relay"]
) -> Optional["Graphs"]:
    """Return the graphs of a rank; None if its steps cannot be captured. Several stages need a relay between them.

    Sums over ranks can be captured if own kernels make them, because those wait for peers on the GPU, or NCCL. All
    ranks get the same plans, so they make and replay the same graphs in the same order.
    """
    is_whole = stage.is_first and stage.is_last
    if not captured_rows(group) or (relay is None and not is_whole):
        return None
    return Graphs(stage, cache, rows, group, relay) if _on_all_ranks(stage.has_kernels, group, rows.device) else None


def _on_all_ranks(value: bool, group: TensorParallelGroup, device: torch.device) -> bool:
    """Return True if ``value`` is true on every rank: if the kernels of one failed their check, none uses graphs."""
    if group.size == 1:
        return value
    return bool(group.all_gather(torch.tensor([value], dtype=torch.uint8, device=device)).all())


def prepared(graphs: "Graphs") -> Optional["Graphs"]:
    """Make the first graphs; return None if code of another library cannot be captured. All ranks run the same code."""
    from mgpu.worker.steps.graph_pool import NotCapturable

    try:
        graphs.prepare()
        return graphs
    except NotCapturable as reason:
        log.warning("steps are launched kernel by kernel, which is slower: %s", reason)
        return None


def prepare_graphs(stage: DecoderStage, cache: KvCache, rows: RowTable, group: TensorParallelGroup) -> None:
    """Launch all kernels of the first graphs of a rank, if it will make any, but capture none."""
    if captured_rows(group):
        Graphs(stage, cache, rows, group, None, capture=False).prepare()


class Graphs:
    """All graphs of one worker."""

    def __init__(
        self,
        stage: DecoderStage,
        cache: KvCache,
        rows: RowTable,
        group: TensorParallelGroup,
        relay: Optional["Relay"],
        capture: bool = True,
    ) -> None:
        from mgpu.worker.steps.decode_graphs import DecodeGraphs, graph_size, staged_length
        from mgpu.worker.steps.graph_pool import GraphParts, GraphPool, Uncaptured
        from mgpu.worker.steps.prompt_graphs import MOST_STAGED, PromptGraphs

        self._rows = rows
        self._posts = relay is not None and relay.post is not None
        # Sizes double, so the least that holds `max_rows` rows is below twice that. Larger ones would never be used.
        self._first_decode = [size for size in _FIRST_DECODE if size < 2 * rows.max_rows]
        self._first_decode = [size for size in self._first_decode if size <= captured_rows(group)]
        most_staged = max(MOST_STAGED, staged_length(graph_size(rows.max_rows), rows.pages is not None))
        tries = stage.facts.borrowed is not None
        self._pool = GraphPool(rows.device, most_staged, tries) if capture else Uncaptured(rows.device, most_staged)
        parts = GraphParts(self._pool, stage, cache, rows, group, relay)
        self._decode, self._prompts = DecodeGraphs(parts), PromptGraphs(parts)

    def take(self, plan: StepPlan) -> bool:
        """Return True if a graph serves a step."""
        return self._decode.takes(plan) or self._prompts.takes(plan)

    def run(self, plan: StepPlan, tag: int) -> Optional["StepOutput"]:
        """Apply and launch a step that `take` accepts; its tokens get the tag. None unless this stage chooses."""
        rows = self._rows
        if self._decode.takes(plan):
            appended = rows.apply_decode(plan)
            return self._decode.run(plan, appended, tag, self._posts and rows.are_simple(plan))
        rows.apply(plan)
        rows.check(plan)
        return self._prompts.run(plan, tag, self._posts and rows.are_simple(plan))

    def prepare(self) -> None:
        """Make the first graphs, the largest first, so that smaller ones fit into its memory. NotCapturable."""
        for size in reversed(self._first_decode):
            self._decode.prepare(size)
        for prompts in _FIRST_PROMPTS:
            if prompts[0] <= self._prompts.most_tokens:
                self._prompts.prepare(prompts)

    def release(self) -> None:
        """Destroy all graphs: NCCL cannot leave its group while a graph has calls of it."""
        torch.cuda.synchronize(self._rows.device)
        self._pool.release()
