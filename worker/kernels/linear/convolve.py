# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""The short convolution of linear attention and its SiLU, over new tokens and what a row keeps of those before.

A row keeps the last W - 1 inputs. Of decoding rows each program has some channels of one row, so it can replace what it
has read. Of prompts many programs read what a row keeps, so another kernel replaces it when they are done.
"""

# T tokens, R rows, C channels, W inputs of the convolution

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.linear.inputs import StateRows
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, wait_for_inputs

_CHANNELS = 256
_PROMPT_CHANNELS, _PROMPT_TOKENS = 128, 16


@triton.jit
def _decode_kernel(
    x_ptr, tail_ptr, weight_ptr, out_ptr, rows_ptr, lens_ptr, C, x_stride, tail_stride,
    W: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    total = tl.load(weight_ptr + c * W + W - 1, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    context = tl.load(lens_ptr + r)
    if context == 0:
        return
    tail_ptr += tl.load(rows_ptr + r).to(tl.int64) * tail_stride
    x = tl.load(x_ptr + r * x_stride + c, mask=mask, other=0.0)
    total *= x.to(tl.float32)
    for j in tl.static_range(W - 1):
        old = tl.load(tail_ptr + j * C + c, mask=mask & (context > 1), other=0.0)
        total += old.to(tl.float32) * tl.load(weight_ptr + c * W + j, mask=mask, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(tail_ptr + (j - 1) * C + c, old, mask=mask)
    tl.store(tail_ptr + (W - 2) * C + c, x.to(tail_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + r * C + c, (total * tl.sigmoid(total)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prompt_kernel(
    x_ptr, tail_ptr, weight_ptr, out_ptr, rows_ptr, lens_ptr, starts_ptr, owners_ptr, T, C, x_stride, tail_stride,
    W: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    owner = tl.load(owners_ptr + t, mask=t < T, other=-1)
    exists = owner >= 0
    start = tl.load(starts_ptr + owner, mask=exists, other=0)
    count = tl.load(starts_ptr + owner + 1, mask=exists, other=0) - start
    has_tail = exists & (tl.load(lens_ptr + owner, mask=exists, other=0) > count)
    row = tl.load(rows_ptr + owner, mask=exists, other=0).to(tl.int64)
    place = t - start
    channel = (c < C)[None, :]
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for back in tl.static_range(W):
        is_new = exists & (place >= back)
        is_kept = has_tail & (place < back)
        new = tl.load(
            x_ptr + (t - back).to(tl.int64)[:, None] * x_stride + c[None, :], mask=is_new[:, None] & channel, other=0.0
        )
        kept_ptr = tail_ptr + (row * tail_stride + (W - 1 + place - back) * C)[:, None] + c[None, :]
        kept = tl.load(kept_ptr, mask=is_kept[:, None] & channel, other=0.0)
        weight = tl.load(weight_ptr + c * W + (W - 1 - back), mask=c < C, other=0.0).to(tl.float32)
        total += (new.to(tl.float32) + kept.to(tl.float32)) * weight[None, :]
    out = (total * tl.sigmoid(total)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + t.to(tl.int64)[:, None] * C + c[None, :], out, mask=exists[:, None] & channel)


@triton.jit
def _tails_kernel(
    x_ptr, tail_ptr, rows_ptr, lens_ptr, starts_ptr, C, x_stride, tail_stride,
    W: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    wait_for_inputs(OVERLAP)
    start = tl.load(starts_ptr + r)
    count = tl.load(starts_ptr + r + 1) - start
    if count == 0:
        return
    has_tail = tl.load(lens_ptr + r) > count
    tail_ptr += tl.load(rows_ptr + r).to(tl.int64) * tail_stride
    for w in tl.static_range(W - 1):
        place = count - (W - 1) + w  # of the new tokens; below zero: of those before
        new = tl.load(x_ptr + (start + place).to(tl.int64) * x_stride + c, mask=mask & (place >= 0), other=0.0)
        # What is read here is further on than all that was written.
        old = tl.load(tail_ptr + (W - 1 + place) * C + c, mask=mask & (place < 0) & has_tail, other=0.0)
        value = tl.where(place >= 0, new.to(tl.float32), old.to(tl.float32))
        tl.store(tail_ptr + w * C + c, value.to(tail_ptr.dtype.element_ty), mask=mask)


def convolve_decoding(x_TC: Tensor, tail_NWC: Tensor, weight_CW: Tensor, rows: StateRows, out_TC: Tensor) -> None:
    """Write outputs of rows that each have one token, the first ones of ``x``, and replace what the rows keep."""
    channels, width = weight_CW.shape
    grid = len(rows.lens_R), ceil_div(channels, _CHANNELS)
    _decode_kernel[grid](
        x_TC, tail_NWC, weight_CW, out_TC, rows.rows_R, rows.lens_R, channels, x_TC.stride(0), tail_NWC.stride(0),
        width, _CHANNELS, overlaps_launches(x_TC.device), **launch_options(x_TC.device, 2),
    )  # fmt: skip


def convolve_prompts(x_TC: Tensor, tail_NWC: Tensor, weight_CW: Tensor, rows: StateRows, out_TC: Tensor) -> None:
    """Write outputs of the tokens of all rows, and replace what the rows keep."""
    channels, width = weight_CW.shape
    assert rows.starts is not None, "prompts have starts"
    strides = channels, x_TC.stride(0), tail_NWC.stride(0)
    options = launch_options(x_TC.device, 4)
    _prompt_kernel[(ceil_div(len(x_TC), _PROMPT_TOKENS), ceil_div(channels, _PROMPT_CHANNELS))](
        x_TC, tail_NWC, weight_CW, out_TC, rows.rows_R, rows.lens_R, rows.starts, rows.owners_T, len(x_TC), *strides,
        width, _PROMPT_CHANNELS, _PROMPT_TOKENS, overlaps_launches(x_TC.device), **options,
    )  # fmt: skip
    _tails_kernel[(len(rows.lens_R), ceil_div(channels, _CHANNELS))](
        x_TC, tail_NWC, rows.rows_R, rows.lens_R, rows.starts, *strides,
        width, _CHANNELS, overlaps_launches(x_TC.device), **launch_options(x_TC.device, 2),
    )  # fmt: skip


def empty_outputs(x_TC: Tensor, channels: int) -> Tensor:
    """Return undefined memory for the convolution's outputs."""
    return torch.empty((len(x_TC), channels), dtype=x_TC.dtype, device=x_TC.device)
