"""Which steps run as CUDA graphs, and which graphs are there from the start."""

from typing import TYPE_CHECKING, Optional

from mgpu.protocol.control import StepPlan
from mgpu.worker.kv_cache import KvCache
from mgpu.worker.models import DecoderStage
from mgpu.worker.rows import RowTable

if TYPE_CHECKING:
    from mgpu.worker.graph_pool import GraphPool, StepOutput

_FIRST_DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FIRST_PROMPTS = ((512, 8, False), (256, 8, False), (128, 8, False), (64, 8, False))
"""Sizes of graphs that are there when the worker is ready; others are made when first needed, in about 50 ms."""


def make_graphs(stage: DecoderStage, cache: KvCache, rows: RowTable) -> Optional["Graphs"]:
    """Give the graphs of a rank that has the whole model; None where its steps are not made of kernels.

    What goes to other ranks is not captured.
    """
    return Graphs(stage, cache, rows) if stage.has_kernels else None


def prepare_graphs(stage: DecoderStage, cache: KvCache, rows: RowTable) -> None:
    """Launch all that the first graphs launch, and capture none."""
    from mgpu.worker.graph_pool import Uncaptured

    Graphs(stage, cache, rows, Uncaptured).prepare()


class Graphs:
    """All graphs of one worker."""

    def __init__(
        self, stage: DecoderStage, cache: KvCache, rows: RowTable, pool_type: type["GraphPool"] | None = None
    ) -> None:
        from mgpu.worker.decode_graphs import DecodeGraphs, graph_size, staged_length
        from mgpu.worker.graph_pool import GraphPool
        from mgpu.worker.prompt_graphs import MOST_STAGED, PromptGraphs

        self._rows = rows
        pool = (pool_type or GraphPool)(rows.device, max(MOST_STAGED, staged_length(graph_size(rows.max_rows))))
        self._decode = DecodeGraphs(pool, stage, cache, rows)
        self._prompts = PromptGraphs(pool, stage, cache, rows)

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
            if size < 2 * self._rows.max_rows:
                self._decode.prepare(size)
        for prompts in _FIRST_PROMPTS:
            self._prompts.prepare(prompts)
