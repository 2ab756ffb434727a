# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of two to eight decode rows on the ordinary arithmetic units, in the manner of `gemv`.

Each thread holds 8 neighbouring weights and multiplies them by every row, so that the work is rows + 1 instructions per
weight: at 4.3 TB/s an SM has 14 issue slots for each.
"""

# M rows of activations, N output channels, K input channels

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.gemv import GemvTiling
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

MAX_ROWS = 8


@triton.jit
def _add_row(acc, w, x_ptr, row, M, k, K, x_stride, EVEN_K: tl.constexpr):
    """Add the products of one row, summed over the 8 weights of a thread; rows past the last repeat it."""
    x_ptrs = x_ptr + tl.minimum(row, M - 1) * x_stride + k
    if EVEN_K:  # noqa: SIM108 - compile-time condition
        x = tl.load(x_ptrs)
    else:
        x = tl.load(x_ptrs, mask=k < K, other=0.0)
    products = tl.reshape(w * x.to(tl.float32)[None, :], [acc.shape[0], acc.shape[1], 8])
    return acc + tl.sum(products, 2)


@triton.jit
def _store_row(y_ptr, acc, bias_ptr, row, M, n, N, y_stride):
    y = tl.sum(acc, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + tl.minimum(n, N - 1)).to(tl.float32)
    tl.store(y_ptr + row * y_stride + n, y.to(y_ptr.dtype.element_ty), mask=(n < N) & (row < M))


@triton.jit(do_not_specialize=["M"])
def _few_row_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    x_stride,
    y_stride,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + column[None, :]
    w = tl.load(w_ptrs, mask=(column < K)[None, :], other=0.0)  # before the wait: weights depend on no kernel
    wait_for_inputs(OVERLAP)
    zero = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
    for k0 in range(0, K, BLOCK_K):
        k = k0 + column
        if k0 > 0:
            w = tl.load(w_ptrs + k0, mask=(k < K)[None, :], other=0.0)
        wide = w.to(tl.float32)
        a0 = _add_row(a0, wide, x_ptr, 0, M, k, K, x_stride, EVEN_K)
        a1 = _add_row(a1, wide, x_ptr, 1, M, k, K, x_stride, EVEN_K)
        if ROWS > 2:
            a2 = _add_row(a2, wide, x_ptr, 2, M, k, K, x_stride, EVEN_K)
            a3 = _add_row(a3, wide, x_ptr, 3, M, k, K, x_stride, EVEN_K)
        if ROWS > 4:
            a4 = _add_row(a4, wide, x_ptr, 4, M, k, K, x_stride, EVEN_K)
            a5 = _add_row(a5, wide, x_ptr, 5, M, k, K, x_stride, EVEN_K)
            a6 = _add_row(a6, wide, x_ptr, 6, M, k, K, x_stride, EVEN_K)
            a7 = _add_row(a7, wide, x_ptr, 7, M, k, K, x_stride, EVEN_K)
    _store_row(y_ptr, a0, bias_ptr, 0, M, n, N, y_stride)
    _store_row(y_ptr, a1, bias_ptr, 1, M, n, N, y_stride)
    if ROWS > 2:
        _store_row(y_ptr, a2, bias_ptr, 2, M, n, N, y_stride)
        _store_row(y_ptr, a3, bias_ptr, 3, M, n, N, y_stride)
    if ROWS > 4:
        _store_row(y_ptr, a4, bias_ptr, 4, M, n, N, y_stride)
        _store_row(y_ptr, a5, bias_ptr, 5, M, n, N, y_stride)
        _store_row(y_ptr, a6, bias_ptr, 6, M, n, N, y_stride)
        _store_row(y_ptr, a7, bias_ptr, 7, M, n, N, y_stride)


def few_row_gemv(
    x_MK: Tensor,
    w_NK: Tensor,
    *,
    bias_N: Tensor | None = None,
    out_MN: Tensor | None = None,
    tiling: GemvTiling | None = None,
) -> Tensor:
    """Multiply up to `MAX_ROWS` rows by w^T, accumulated in float32. Rows of ``x_MK`` are contiguous."""
    rows, k = x_MK.shape
    n = w_NK.shape[0]
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"few_row_gemv takes 1 to {MAX_ROWS} rows, got {rows}")
    tiling = tiling or GemvTiling(4, 1024, 4, False)
    if out_MN is None:
        out_MN = torch.empty(rows, n, dtype=x_MK.dtype, device=x_MK.device)
    _few_row_kernel[(ceil_div(n, tiling.block_n),)](
        x_MK,
        w_NK,
        bias_N,
        out_MN,
        rows,
        n,
        k,
        x_MK.stride(0),
        out_MN.stride(0),
        max(2, power_of_2(rows)),
        tiling.block_n,
        tiling.block_k,
        k % tiling.block_k == 0,
        overlaps_launches(x_MK.device),
        **launch_options(x_MK.device, tiling.num_warps, 1),
    )
    return out_MN
