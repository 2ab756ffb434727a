"""The rows: each keeps one request's tokens, blocks and sampling between steps.

Rows live on the device. So a plan carries only changes, and a sampled token is in its place for the next step before
the host has read it.
"""

# T tokens of the step, R rows in it, S rows that sample, B blocks of the longest table

import sys
from array import array
from dataclasses import dataclass
from itertools import accumulate
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan
from mgpu.worker.errors import BadPlan
from mgpu.worker.state.batch import InPages, StepBatch

if sys.byteorder != "little":
    raise ImportError("mgpu's messages are little-endian")

_NO_SAMPLING = RowSampling()
_HEAD = Struct("<Qf")
"""The first columns of a row, before its blocks and its tokens: seed and temperature."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """The rows that choose a token in a step: parallel columns, on the host and on the device."""

    rows: list[int]
    positions: list[int]
    """Position of the token that is chosen."""
    sampling: list[RowSampling]
    rows_S: Tensor
    """int64 [S]."""
    positions_S: Tensor
    """int64 [S]."""

    def pick(self, indices: list[int], indices_N: Tensor) -> "SampleRequest":
        """Return the request of some of the rows; ``indices_N`` are the same indices on the device."""
        return SampleRequest(
            [self.rows[i] for i in indices],
            [self.positions[i] for i in indices],
            [self.sampling[i] for i in indices],
            self.rows_S[indices_N],
            self.positions_S[indices_N],
        )


class AppendedBlocks(NamedTuple):
    """What the kernel of a decode step appends to its rows, in the order of the plan."""

    blocks: list[int]
    """-1: none."""
    pages: list[int]
    """Where window layers keep each of them; empty if they keep all blocks."""


class RowTable:
    """State of all rows of one worker.

    ``tokens`` is int32 [max_rows, max_seq_len + 1]. Requests never reach the last column: the last token of a request
    of full length goes to position max_seq_len - 1, and no step is planned past it. It is there for the warm-up, which
    may choose a token for position max_seq_len if that is at most 18 (`ModelRunner.warm_up`). ``blocks`` is int32
    [max_rows, blocks of the longest], ``seeds`` int32 [max_rows, 2], ``temperatures`` float32 [max_rows]. All are
    columns of one table, so that a new request is one copy, for which the first step of its prompt waits.
    """

    def __init__(
        self,
        max_rows: int,
        max_seq_len: int,
        block_size: int,
        num_blocks: int,
        device: torch.device,
        num_pages: int = 0,
    ) -> None:
        self.device = device
        self.max_rows = max_rows
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._num_pages = num_pages
        self.pages: Tensor | None = None
        """int32 [blocks]: where window layers keep each block. Has a meaning for blocks that some row sees."""
        if num_pages:
            self.pages = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        width = max_seq_len + 1
        columns = [2, 1, -(-width // block_size), width]
        self._table = torch.zeros((max_rows, sum(columns)), dtype=torch.int32, device=device)
        self.seeds, temperatures, self.blocks, self.tokens = torch.split(self._table, columns, dim=1)
        self.temperatures = temperatures.view(torch.float32)[:, 0]
        self.sampling = [_NO_SAMPLING] * max_rows
        self.is_simple = [True] * max_rows
        """`RowSampling.is_simple` of each row, which every step asks."""
        self.occupant_ids = [0] * max_rows
        """Number of the request that has the row, counted per row, to tell late tokens of an earlier request apart."""
        self.prompt_lens = [0] * max_rows
        self._block_counts = [0] * max_rows

    def apply(self, plan: StepPlan) -> None:
        """Free, fill and extend rows as the plan says. BadPlan when it names impossible rows or blocks.

        Freed rows change only what the host knows of them. New rows and new blocks are copied to the device.
        """
        self._change_occupants(plan)
        self._map_pages(plan.page_blocks, plan.page_ids)
        if plan.block_rows:
            self._append(plan.block_rows, plan.block_ids)

    def apply_decode(self, plan: StepPlan) -> AppendedBlocks:
        """Like `apply`, for a step of one token per row, except that the step's own kernel appends the blocks."""
        self._change_occupants(plan)
        appended_blocks, pages = [-1] * len(plan.rows), dict(zip(plan.page_blocks, plan.page_ids, strict=True))
        if plan.block_rows:
            index_of = {row: index for index, row in enumerate(plan.rows)}
            is_once = len(index_of.keys() & set(plan.block_rows)) == len(plan.block_rows)
            # The kernel can append only the block that the row's token of this step goes to.
            if is_once and all(
                plan.starts[index_of[row]] == self._block_counts[row] * self.block_size for row in plan.block_rows
            ):
                self._check_blocks(plan.block_ids)
                for row, block in zip(plan.block_rows, plan.block_ids, strict=True):
                    appended_blocks[index_of[row]] = block
                    self._block_counts[row] += 1
            else:
                self._append(plan.block_rows, plan.block_ids)
        self.check(plan)
        if self.pages is None:
            return AppendedBlocks(appended_blocks, [])
        appended_pages = [pages.pop(block, 0) if block >= 0 else 0 for block in appended_blocks]
        self._check_pages(appended_pages)
        self._map_pages(list(pages), list(pages.values()))
        return AppendedBlocks(appended_blocks, appended_pages)

    def _change_occupants(self, plan: StepPlan) -> None:
        for row in plan.free_rows:
            self.sampling[row] = _NO_SAMPLING
            self._block_counts[row] = 0
        for new in plan.new_rows:
            self._fill(new)

    def _fill(self, new: NewRow) -> None:
        num_tokens, most_tokens, most_blocks = len(new.token_ids) // 4, self.tokens.shape[1], self.blocks.shape[1]
        if num_tokens > most_tokens or len(new.block_ids) > most_blocks:
            raise BadPlan(
                f"row {new.row} with {num_tokens} tokens and {len(new.block_ids)} blocks; "
                f"a row holds {most_tokens} and {most_blocks}"
            )
        self._check_blocks(new.block_ids)
        head = _HEAD.pack(new.sampling.seed & 0xFFFF_FFFF_FFFF_FFFF, new.sampling.temperature)
        blocks = array("i", new.block_ids).tobytes().ljust(4 * most_blocks, b"\0")
        values = torch.frombuffer(bytearray(head + blocks + new.token_ids), dtype=torch.int32)
        self._table[new.row, : len(values)].copy_(self._pinned(values), non_blocking=True)
        self._block_counts[new.row] = len(new.block_ids)
        self.prompt_lens[new.row] = new.prompt_len
        self.sampling[new.row] = new.sampling
        self.is_simple[new.row] = new.sampling.is_simple
        self.occupant_ids[new.row] += 1

    def _append(self, rows: list[int], block_ids: list[int]) -> None:
        self._check_blocks(block_ids)
        places = []
        for row in rows:
            places.append(self._block_counts[row])
            self._block_counts[row] += 1
        if max(places) >= self.blocks.shape[1]:
            raise BadPlan(f"a row was given more than {self.blocks.shape[1]} blocks")
        index = self.to_device([rows, places, block_ids])
        self.blocks[index[0], index[1]] = index[2].to(torch.int32)

    def _map_pages(self, blocks: list[int], pages: list[int]) -> None:
        """Note where window layers keep some blocks from now on."""
        if not blocks:
            return
        self._check_blocks(blocks)
        self._check_pages(pages)
        assert self.pages is not None, "pages without a pool of them"
        blocks_N, pages_N = self.to_device([blocks, pages])
        self.pages[blocks_N] = pages_N.to(torch.int32)

    def _check_pages(self, pages: list[int]) -> None:
        if pages and not 0 <= min(pages) <= max(pages) < self._num_pages:
            raise BadPlan(f"pages {min(pages)}..{max(pages)} in a pool of {self._num_pages}")

    def _check_blocks(self, block_ids: list[int]) -> None:
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise BadPlan(f"blocks {min(block_ids)}..{max(block_ids)} in a pool of {self.num_blocks}")

    def batch(self, plan: StepPlan) -> tuple[StepBatch, SampleRequest | None]:
        """Build the tensors of a step, with one copy to the device for any number of rows."""
        contexts = self.check(plan)
        ends = list(accumulate(plan.counts))
        total = ends[-1]
        sampling = [i for i, samples in enumerate(plan.samples) if samples]
        sampled_rows = [plan.rows[i] for i in sampling]
        positions = [contexts[i] for i in sampling]
        logit_rows = [ends[i] - 1 for i in sampling]
        columns = [plan.rows, plan.starts, plan.counts, ends, contexts, logit_rows, sampled_rows, positions]
        rows_R, starts_R, counts_R, ends_R, contexts_R, logit_rows_S, rows_S, positions_S = self.to_device(columns)

        if total == len(plan.rows):  # one token per row: decoding
            token_rows_T, positions_T = rows_R, starts_R
        else:
            token_rows_T, positions_T = _spread(rows_R, starts_R, counts_R, ends_R, total)
        blocks_T = self.blocks[token_rows_T, positions_T // self.block_size]
        tables_RB = self.blocks[rows_R, : -(-max(contexts) // self.block_size)]
        batch = StepBatch(
            rows=rows_R,
            token_ids=self.tokens[token_rows_T, positions_T].long(),
            positions=positions_T,
            slots=self._slots(blocks_T, positions_T),
            query_starts=torch.cat([ends_R.new_zeros(1), ends_R]).to(torch.int32),
            context_lens=contexts_R.to(torch.int32),
            block_tables=tables_RB,
            logit_rows=logit_rows_S,
            query_lens_host=plan.counts,
            context_lens_host=contexts,
            in_pages=self._in_pages(blocks_T, positions_T, tables_RB),
        )
        if not sampling:
            return batch, None
        return batch, self.request(sampled_rows, positions, rows_S, positions_S)

    def _in_pages(self, blocks_T: Tensor, positions_T: Tensor, tables_RB: Tensor) -> InPages | None:
        if self.pages is None:
            return None
        return InPages(self._slots(self.pages[blocks_T], positions_T), self.pages[tables_RB])

    def _slots(self, blocks_T: Tensor, positions_T: Tensor) -> Tensor:
        return blocks_T.long() * self.block_size + positions_T % self.block_size

    def request(self, rows: list[int], positions: list[int], rows_S: Tensor, positions_S: Tensor) -> SampleRequest:
        """Return the request to choose tokens of ``rows`` at ``positions``, which are also on the device."""
        return SampleRequest(rows, positions, [self.sampling[row] for row in rows], rows_S, positions_S)

    def check(self, plan: StepPlan) -> list[int]:
        """Return each row's context after the step. BadPlan if a row has no room or no blocks for it."""
        contexts = [start + count for start, count in zip(plan.starts, plan.counts, strict=True)]
        if not plan.rows or min(plan.counts) < 1 or min(plan.starts) < 0:
            raise BadPlan("a step needs rows, each with a position and at least one token")
        for row, context in zip(plan.rows, contexts, strict=True):
            if context > self._block_counts[row] * self.block_size or context >= self.tokens.shape[1]:
                raise BadPlan(
                    f"row {row} reaches {context} tokens with {self._block_counts[row]} blocks "
                    f"of {self.block_size} and room for {self.tokens.shape[1] - 1}"
                )
        return contexts

    def are_simple(self, plan: StepPlan) -> bool:
        """Return True if all rows of a step that sample are `RowSampling.is_simple`."""
        return all(self.is_simple[row] for row, samples in zip(plan.rows, plan.samples, strict=True) if samples)

    def write_sampled(self, request: SampleRequest, ids_S: Tensor) -> None:
        """Write chosen tokens, int32 [S], to where the next step of their rows reads them."""
        self.tokens[request.rows_S, request.positions_S] = ids_S

    def to_device(self, columns: list[list[int]]) -> tuple[Tensor, ...]:
        """Copy columns of integers at once; return int64 tensors of the same lengths."""
        values = torch.tensor([value for column in columns for value in column], dtype=torch.int64)
        flat = self._pinned(values).to(self.device, non_blocking=True)
        return torch.split(flat, [len(column) for column in columns])

    def _pinned(self, values: Tensor) -> Tensor:
        """Return values in memory from which a copy to a GPU runs in the background."""
        return values.pin_memory() if self.device.type == "cuda" else values


def _spread(rows_R: Tensor, starts_R: Tensor, counts_R: Tensor, ends_R: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return row and position of each of the step's T tokens."""
    owner_T = torch.repeat_interleave(counts_R, output_size=total)
    offset_R = starts_R - (ends_R - counts_R)
    return rows_R[owner_T], torch.arange(total, device=rows_R.device) + offset_R[owner_T]
