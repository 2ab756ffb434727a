"""Short steps with prompts in them as CUDA graphs: launching their kernels one by one takes longer than running them.

Rows that decode come before those with prompts. Both attention kernels run over all rows: for the decode kernel, rows
with prompts have no context; for the prefill kernel, rows that decode have no queries.
"""

# T tokens of the padded step, R rows of it

from array import array
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import StepPlan
from mgpu.worker.attention.triton_backend import PagedRows, TritonStep
from mgpu.worker.kernels.linear.inputs import StateRows, StepStates, owners_of
from mgpu.worker.steps.graph_pool import HEAD, GraphParts, StepGraph, StepOutput, padded

TOKENS = (64, 128, 192, 256, 384, 512)
"""Sizes of steps that graphs are made for. Longer steps keep the GPU busy while they are launched."""
ROWS = (8, 64)
LATENT_PAIRS = 1 << 20
"""Pairs of a query and a key from which on latent attention is quicker without a graph, which cannot project keys."""
_STARTS_PAD = 4

Size = tuple[int, int, bool]
"""Tokens, rows, and whether some rows decode."""


class PromptGraphs:
    """One graph per `Size`, for steps with prompts that have at most 512 tokens and 64 rows in all.

    For the same layouts as `DecodeGraphs`.
    """

    def __init__(self, parts: GraphParts) -> None:
        self._parts = parts
        self._rows = parts.rows
        self.most_tokens = min(TOKENS[-1], parts.most_rows)
        self._graphs: dict[Size, StepGraph] = {}

    def takes(self, plan: StepPlan) -> bool:
        """Return True if a step is small enough. Steps that only decode belong to `DecodeGraphs`."""
        if not 0 < len(plan.rows) <= ROWS[-1]:
            return False
        total = sum(plan.counts)
        if self._parts.stage.facts.latent is not None and _pairs(plan) > LATENT_PAIRS:
            return False
        return total <= self.most_tokens and _first_fit(TOKENS, total) <= self.most_tokens

    def prepare(self, size: Size) -> None:
        """Make the graph of a size, if it is not there yet."""
        if size not in self._graphs:
            self._graphs[size] = self._parts.pool.capture(_length(size), lambda staged: self._forward(size, staged))

    def run(self, plan: StepPlan, tag: int, is_simple: bool) -> StepOutput | None:
        """Launch a step that `takes` accepts, after `RowTable.apply`. Rows that do not sample get arbitrary ids."""
        decoding = next((i for i, count in enumerate(plan.counts) if count > 1), len(plan.rows))
        total, num_rows = sum(plan.counts), len(plan.rows)
        tokens, rows = _first_fit(TOKENS, total), _first_fit(ROWS, num_rows)
        size = tokens, rows, decoding > 0
        self.prepare(size)
        contexts = [start + count for start, count in zip(plan.starts, plan.counts, strict=True)]
        ends = list(accumulate(plan.counts))
        token_rows = [row for row, count in zip(plan.rows, plan.counts, strict=True) for _ in range(count)]
        positions = [p for start, end in zip(plan.starts, contexts, strict=True) for p in range(start, end)]
        sampled = [context if samples else 0 for context, samples in zip(contexts, plan.samples, strict=True)]
        values = [
            *padded([total, tag, int(is_simple)], HEAD),
            *padded(token_rows, tokens),
            *padded(positions, tokens),
            *padded(plan.rows, rows),
            *padded(sampled, rows),
            *padded([end - 1 for end in ends], rows),
            *padded(contexts[:decoding], rows),
            *padded([0] * decoding + contexts[decoding:], rows),
            # Rows that decode have no queries here: theirs begin and end where those of the first prompt begin.
            *padded([decoding] * (decoding + 1) + ends[decoding:], rows + _STARTS_PAD, total),
        ]
        return self._parts.pool.replay(self._graphs[size], array("i", values))

    def _forward(self, size: Size, staged: Tensor) -> StepOutput | None:
        tokens, num_rows, decodes = size
        columns = torch.split(staged, [HEAD, tokens, tokens, *[num_rows] * 5, num_rows + _STARTS_PAD])
        head, token_rows_T, positions_T, rows_R, sampled_R, last_R, decode_lens_R, prompt_lens_R, starts = columns
        rows, parts, stage = self._rows, self._parts, self._parts.stage
        parts.fetch_tokens(token_rows_T, positions_T, staged)
        parts.expect_tokens(rows_R, sampled_R, staged)
        token_rows_T, positions_T = token_rows_T.long(), positions_T.long()
        blocks_T = rows.blocks[token_rows_T, positions_T // rows.block_size]
        is_token_T = torch.arange(tokens, device=rows.device) < head[:1]
        tables_RP = rows.blocks[rows_R.long()]
        starts = starts[: num_rows + 1]
        states, owners_T = None, owners_of(starts, tokens) if stage.has_owners else None
        if stage.facts.linear is not None:
            prompts = StateRows(rows_R, prompt_lens_R, starts, owners_T)
            states = StepStates(StateRows(rows_R, decode_lens_R) if decodes else None, prompts)

        def step_over(blocks_T: Tensor, tables_RP: Tensor) -> TritonStep:
            slots_T = blocks_T.long() * rows.block_size + positions_T % rows.block_size
            return TritonStep(
                positions_T,
                slots_T.where(is_token_T, -1),
                PagedRows(tables_RP, decode_lens_R) if decodes else None,
                PagedRows(tables_RP, prompt_lens_R, starts, owners_T),
                None,
                states,
            )

        step = step_over(blocks_T, tables_RP)
        if rows.pages is not None:
            step = replace(step, in_pages=step_over(rows.pages[blocks_T], rows.pages[tables_RP]))
        if stage.is_first:
            x_TD = stage.embed(rows.tokens[token_rows_T, positions_T].long())
        else:
            x_TD = parts.receive(tokens, staged)
        x_TD = stage.run_layers_with(x_TD, step, positions_T, parts.cache)
        if not stage.is_last:
            parts.send(x_TD, staged)
            return None
        return parts.finish(x_TD[last_R.long()], rows_R, sampled_R, staged)


def _first_fit(sizes: tuple[int, ...], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def _pairs(plan: StepPlan) -> int:
    """Return about how many pairs of a new token and a token of its context a step has."""
    return sum(count * (start + count) for start, count in zip(plan.starts, plan.counts, strict=True))


def _length(size: Size) -> int:
    tokens, num_rows, _ = size
    return HEAD + 2 * tokens + 6 * num_rows + _STARTS_PAD


MOST_STAGED = _length((TOKENS[-1], ROWS[-1], True))
