"""Decode steps as CUDA graphs: the host only fills one small buffer and launches one graph.

A graph serves all batches up to its size; rows that only pad the batch have no context and write nothing. The graph
reads its inputs from the persistent rows, and writes the chosen tokens to them for the next step.
"""

# R rows of the padded batch

from array import array
from dataclasses import replace

from torch import Tensor

from mgpu.protocol.internal.worker_messages import StepPlan
from mgpu.worker.attention.triton_backend import PagedRows, TritonStep
from mgpu.worker.kernels.linear.inputs import StateRows, StepStates
from mgpu.worker.kernels.step_inputs import DecodeInputs, prepare_decode
from mgpu.worker.state.rows import AppendedBlocks
from mgpu.worker.steps.graph_pool import HEAD, GraphParts, StepGraph, StepOutput, padded, whole_lines

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
"""Batches that graphs are made for; beyond the last, its multiples."""


class DecodeGraphs:
    """One graph per batch size, for steps in which every row computes and samples one token.

    A rank has whole layers, or slices of them that a group adds up. A `Relay` connects it with other stages.
    """

    def __init__(self, parts: GraphParts) -> None:
        self._parts = parts
        self._rows = rows = parts.rows
        self._graphs: dict[int, StepGraph] = {}
        self._has_pages = rows.pages is not None
        shape = graph_size(rows.max_rows), rows.blocks.shape[1]
        self._inputs = DecodeInputs.create(*shape, rows.device, self._has_pages)

    def takes(self, plan: StepPlan) -> bool:
        """Return True if every row of a plan computes and samples one token, and graphs can add up so many rows."""
        if graph_size(len(plan.rows)) > self._parts.most_rows:
            return False
        return bool(plan.rows) and max(plan.counts) == 1 and min(plan.samples) == 1

    def prepare(self, size: int) -> None:
        """Make the graph of a size, if it is not there yet."""
        if size not in self._graphs:
            self._graphs[size] = self._parts.pool.capture(
                staged_length(size, self._has_pages), lambda staged: self._forward(size, staged)
            )

    def run(self, plan: StepPlan, appended: AppendedBlocks, tag: int, is_simple: bool) -> StepOutput | None:
        """Launch a step that `takes` accepts; ``appended`` is the result of `RowTable.apply_decode`."""
        size = graph_size(len(plan.rows))
        self.prepare(size)
        column = whole_lines(size)
        columns = padded(plan.rows, column) + padded(plan.starts, column) + padded(appended.blocks, column)
        if self._has_pages:
            columns += padded(appended.pages, column)
        return self._parts.pool.replay(
            self._graphs[size], array("i", [*padded([len(plan.rows), tag, int(is_simple)], HEAD), *columns])
        )

    def _forward(self, size: int, staged: Tensor) -> StepOutput | None:
        rows, column = self._rows, whole_lines(size)
        rows_R, starts_R, appended_R, *appended_pages = (
            staged[HEAD + i * column :][:size] for i in range(3 + self._has_pages)
        )
        inputs = self._inputs.first(size)
        parts, stage = self._parts, self._parts.stage
        parts.fetch_tokens(rows_R, starts_R, staged)
        known = rows.tokens, rows.blocks, rows.block_size
        prepare_decode(rows_R, starts_R, staged[:1], *known, inputs, appended_R, rows.pages, *appended_pages)
        parts.expect_tokens(rows_R, inputs.context_lens, staged)
        x_RD = stage.embed(inputs.token_ids) if stage.is_first else parts.receive(size, staged)
        states = StepStates(StateRows(rows_R, inputs.context_lens), None) if stage.facts.linear is not None else None
        lens_R = inputs.context_lens
        step = TritonStep(inputs.positions, inputs.slots, PagedRows(inputs.block_tables, lens_R), None, None, states)
        if inputs.page_slots is not None and inputs.page_tables is not None:
            paged = TritonStep(inputs.positions, inputs.page_slots, PagedRows(inputs.page_tables, lens_R), None, None)
            step = replace(step, in_pages=paged)
        x_RD = stage.run_layers_with(x_RD, step, inputs.positions, parts.cache)
        if not stage.is_last:
            parts.send(x_RD, staged)
            return None
        # The position to choose for is the length of the context.
        return parts.finish(x_RD, rows_R, inputs.context_lens, staged)


def graph_size(rows: int) -> int:
    """Return the size of the graph that serves a batch."""
    return next((size for size in SIZES if size >= rows), -(-rows // SIZES[-1]) * SIZES[-1])


def staged_length(size: int, has_pages: bool) -> int:
    """Return how many numbers a step of this size is staged in."""
    return HEAD + (3 + has_pages) * whole_lines(size)
