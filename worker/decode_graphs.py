"""Decode steps as CUDA graphs: what a step does on the host is fill one small buffer and launch one graph.

A graph serves all batches up to its size; the rows that fill it up read token 0 of no context and write nothing. It
takes its inputs from the persistent rows, and leaves the chosen tokens in them for the next step.
"""

# R rows of the padded batch, V tokens of the vocabulary

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.control import StepPlan
from mgpu.worker.batch import StepBatch
from mgpu.worker.kernels.sample import sample
from mgpu.worker.kernels.step_inputs import DecodeInputs, prepare_decode
from mgpu.worker.kv_cache import KvCache
from mgpu.worker.models import DecoderStage
from mgpu.worker.rows import RowTable

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
"""Batches that graphs are made for; larger ones are multiples of the last."""
_HEAD = 4
"""Numbers before the columns of a staged step; columns start at addresses that are multiples of 16."""
_STAGES = 4
"""Staging buffers in turn: two steps may be in flight."""


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """Results of the latest replay, overwritten by the next one."""

    logits_RV: Tensor
    """In the model's dtype."""
    ids_R: Tensor
    """int32: the choice for rows that need no more than noise."""


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    staged: Tensor
    output: DecodeOutput


class DecodeGraphs:
    """The graphs of a rank that has the whole model. All share one memory pool, since one runs at a time."""

    def __init__(self, stage: DecoderStage, cache: KvCache, rows: RowTable, max_rows: int) -> None:
        self._stage = stage
        self._cache = cache
        self._rows = rows
        self._max_rows = max_rows
        self._graphs: dict[int, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(rows.device)  # type: ignore[no-untyped-call]
        most = graph_size(max_rows)
        self._inputs = DecodeInputs.create(most, rows.blocks.shape[1], rows.device)
        self._starts_R = torch.arange(most + 1, dtype=torch.int32, device=rows.device)
        size = _HEAD + 3 * _column(most)
        self._pinned = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(_STAGES)]
        self._copied = [torch.cuda.Event() for _ in range(_STAGES)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def takes(self, plan: StepPlan) -> bool:
        """Say whether every row of a plan computes and samples one token."""
        return bool(plan.rows) and max(plan.counts) == 1 and min(plan.samples) == 1

    def prepare(self, sizes: tuple[int, ...]) -> None:
        """Make graphs ahead of their first use, the largest first: smaller ones fit into its memory."""
        for size in sorted(sizes, reverse=True):
            self._graph(size)

    def run(self, plan: StepPlan, fresh: list[int]) -> DecodeOutput:
        """Launch a step that `takes`; ``fresh`` is what `RowTable.apply_decode` gave."""
        graph = self._graph(graph_size(len(plan.rows)))
        self._stage_inputs(graph.staged, plan, fresh)
        graph.graph.replay()
        return graph.output

    def _stage_inputs(self, staged: Tensor, plan: StepPlan, fresh: list[int]) -> None:
        count = len(plan.rows)
        padding = [0] * ((len(staged) - _HEAD) // 3 - count)
        values = array("i", [count, 0, 0, 0, *plan.rows, *padding, *plan.starts, *padding, *fresh, *padding])
        self._turn = (self._turn + 1) % _STAGES
        pinned = self._pinned[self._turn][: len(values)]
        self._copied[self._turn].synchronize()
        pinned.copy_(torch.frombuffer(values, dtype=torch.int32))
        staged.copy_(pinned, non_blocking=True)
        self._copied[self._turn].record()

    def _graph(self, size: int) -> _Graph:
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        return self._graphs[size]

    @torch.inference_mode()
    def _capture(self, size: int) -> _Graph:
        staged = torch.zeros(_HEAD + 3 * _column(size), dtype=torch.int32, device=self._rows.device)
        self._forward(size, staged)  # compiles and loads what a capture must not; with no rows it changes nothing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Not torch.cuda.graph, which collects garbage and empties the allocator's cache for each graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = self._forward(size, staged)
            finally:
                graph.capture_end()
        return _Graph(graph, staged, output)

    def _forward(self, size: int, staged: Tensor) -> DecodeOutput:
        rows, column = self._rows, _column(size)
        rows_R, starts_R, fresh_R = (staged[_HEAD + i * column :][:size] for i in range(3))
        everything = self._inputs
        inputs = DecodeInputs(
            everything.token_ids[:size],
            everything.positions[:size],
            everything.slots[:size],
            everything.context_lens[:size],
            everything.block_tables[:size],
        )
        prepare_decode(rows_R, starts_R, staged[:1], rows.tokens, rows.blocks, rows.block_size, inputs, fresh_R)
        x_RD = self._stage.embed(inputs.token_ids)
        x_RD = self._stage.run_layers(x_RD, self._batch(inputs, size), self._cache)
        logits_RV = self._stage.raw_logits(x_RD)
        _, ids_R = sample(
            logits_RV,
            rows_S=rows_R,
            positions_S=inputs.context_lens,  # the token that is chosen comes right after the context
            temperatures=rows.temperatures,
            seeds=rows.seeds,
            tokens=rows.tokens,
        )
        return DecodeOutput(logits_RV, ids_R)

    def _batch(self, inputs: DecodeInputs, size: int) -> StepBatch:
        return StepBatch(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slots=inputs.slots,
            query_starts=self._starts_R[: size + 1],
            context_lens=inputs.context_lens,
            block_tables=inputs.block_tables,
            logit_rows=self._starts_R[:size],
            query_lens_host=[1] * size,
            context_lens_host=[1] * size,
        )


def graph_size(rows: int) -> int:
    """Give the size of the graph that serves a batch."""
    return next((size for size in SIZES if size >= rows), -(-rows // SIZES[-1]) * SIZES[-1])


def _column(size: int) -> int:
    return -(-size // 4) * 4
