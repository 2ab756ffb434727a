# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Prepare the inputs of a decode step from the persistent rows in one kernel; only the list of rows is the host's."""

# R rows of the (padded) batch, W width of the token table, P pages of a row

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, wait_for_inputs

_CHUNK = 256
"""Pages that a program copies at once."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Buffers that a captured graph reads; rows past the batch get token 0, position 0, slot -1 and context 0."""

    token_ids: Tensor
    """int64 [R]."""
    positions: Tensor
    """int64 [R]."""
    slots: Tensor
    """int64 [R]."""
    context_lens: Tensor
    """int32 [R]."""
    block_tables: Tensor
    """int32 [R, P]."""
    page_slots: Tensor | None = None
    """int64 [R]: ``slots`` in layers that keep blocks in sight only; None: there are no such layers."""
    page_tables: Tensor | None = None
    """int32 [R, P]: ``block_tables`` in these."""

    @staticmethod
    def create(rows: int, pages: int, device: torch.device, has_pages: bool = False) -> "DecodeInputs":
        return DecodeInputs(
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros((rows, pages), dtype=torch.int32, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device) if has_pages else None,
            torch.zeros((rows, pages), dtype=torch.int32, device=device) if has_pages else None,
        )

    def first(self, rows: int) -> "DecodeInputs":
        """Return the buffers of the first rows."""
        own = self.token_ids, self.positions, self.slots, self.context_lens, self.block_tables
        paged = self.page_slots, self.page_tables
        return DecodeInputs(*(x[:rows] for x in own), *(None if x is None else x[:rows] for x in paged))


@triton.jit
def _inputs_kernel(
    rows_ptr, starts_ptr, count_ptr, appended_ptr, tokens_ptr, blocks_ptr,
    token_ids_ptr, positions_ptr, slots_ptr, lens_ptr, tables_ptr,
    pages_ptr, appended_pages_ptr, page_slots_ptr, page_tables_ptr,
    PAGES, tokens_stride, blocks_stride,
    BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    wait_for_inputs(OVERLAP)
    active = r < tl.load(count_ptr)
    row = tl.load(rows_ptr + r, mask=active, other=0).to(tl.int64)
    position = tl.load(starts_ptr + r, mask=active, other=0).to(tl.int64)
    token = tl.load(tokens_ptr + row * tokens_stride + position, mask=active, other=0)
    current = position // BLOCK_SIZE
    block = tl.load(blocks_ptr + row * blocks_stride + current, mask=active, other=0)
    if appended_ptr is not None:
        appended = tl.load(appended_ptr + r, mask=active, other=-1).to(tl.int32)
        block = tl.where(appended >= 0, appended, block)
        tl.store(blocks_ptr + row * blocks_stride + current, block, mask=appended >= 0)
    if pages_ptr is not None:
        current_page = tl.load(pages_ptr + block, mask=active, other=0)
        if appended_ptr is not None:
            appended_page = tl.load(appended_pages_ptr + r, mask=active, other=0).to(tl.int32)
            current_page = tl.where(appended >= 0, appended_page, current_page)
            tl.store(pages_ptr + block, current_page, mask=appended >= 0)
        page_slot = current_page.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(page_slots_ptr + r, tl.where(active, page_slot, -1))
    tl.store(token_ids_ptr + r, token.to(tl.int64))
    tl.store(positions_ptr + r, position)
    tl.store(slots_ptr + r, tl.where(active, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    tl.store(lens_ptr + r, tl.where(active, position + 1, 0).to(tl.int32))
    used = tl.where(active, current + 1, 0).to(tl.int32)
    for first in range(0, used, CHUNK):
        page = first + tl.arange(0, CHUNK)
        blocks = tl.load(blocks_ptr + row * blocks_stride + page, mask=page < used, other=0)
        blocks = tl.where(page == current, block, blocks)  # the store above may not be visible yet
        tl.store(tables_ptr + r.to(tl.int64) * PAGES + page, blocks, mask=page < used)
        if pages_ptr is not None:
            pages = tl.load(pages_ptr + blocks, mask=page < used, other=0)
            pages = tl.where(page == current, current_page, pages)
            tl.store(page_tables_ptr + r.to(tl.int64) * PAGES + page, pages, mask=page < used)


def prepare_decode(
    rows_R: Tensor,
    starts_R: Tensor,
    count: Tensor,
    tokens: Tensor,
    blocks: Tensor,
    block_size: int,
    out: DecodeInputs,
    appended_R: Tensor | None = None,
    pages: Tensor | None = None,
    appended_pages_R: Tensor | None = None,
) -> None:
    """Fill ``out`` for rows that each compute one token.

    ``rows_R`` and ``starts_R`` (int32 or int64 [R]) are the numbers of the rows and the positions of their next tokens,
    of which the first ``count`` (int32 or int64 [1], on the device) count. ``tokens`` int32 [rows, W] and ``blocks``
    int32 [rows, P] are the persistent state. ``appended_R``: a block to append to the row first, for the next token;
    -1: none. Pages of ``out.block_tables`` past a row's context keep their contents. ``pages`` int32: where layers
    that keep blocks in sight only have each block; that of an appended one is in ``appended_pages_R``, and is noted.
    """
    rows, width = out.block_tables.shape
    device = out.token_ids.device
    _inputs_kernel[(rows,)](
        rows_R, starts_R, count, appended_R, tokens, blocks,
        out.token_ids, out.positions, out.slots, out.context_lens, out.block_tables,
        pages, appended_pages_R, out.page_slots, out.page_tables,
        width, tokens.stride(0), blocks.stride(0),
        block_size, _CHUNK, overlaps_launches(device),
        **launch_options(device, 4),
    )  # fmt: skip
