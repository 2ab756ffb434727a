# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix products of decode steps: few rows, weights streamed once at memory bandwidth.

y_MN = x_MK @ w_NK^T, both of one type: bfloat16, or float8 e4m3 with one scale per row of x and per output channel.
The weights are the tall operand (their rows go along the tensor core's 64-wide side), the activations the narrow one,
padded to 16 rows. Packed weights with wider activations are in `quantized_gemm`.
Where N gives too few programs K is split; the last program of a tile to finish adds the partial sums in split order,
so that the result does not depend on which one that was.
"""

# M rows of activations, N output channels, K input channels

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mgpu.worker.kernels.runtime import (
    HOPPER_SMS,
    Workspace,
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
    wait_for_inputs,
)

MAX_ROWS = 64
"""Beyond this a library product is at least as fast."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: see `choose_tiling`."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 4
    narrow: bool = False
    """Pad to 8 rows, not 16, where there are no more. Such tiles use the 16-wide tensor-core instruction."""
    bulk: bool = False
    """Load the weights through a tensor map."""
    prefetch_bytes: int = 0
    """Weights per program to ask for while the previous kernel still runs. All programs' together must fit in L2."""

    def block_m(self, rows: int) -> int:
        """Rows of the padded tile."""
        return max(8 if self.narrow else 16, power_of_2(rows))

    def prefetch_per_row(self, row_bytes: int) -> int:
        """Bytes to prefetch of each weight row, given how many the program reads of it."""
        return min(self.prefetch_bytes // self.block_n, row_bytes) & ~15


@triton.jit
def prefetch_rows(w_ptr, first_row, N, row_bytes, begin_byte, num_bytes, ROWS: tl.constexpr):
    """Ask for ``num_bytes`` of each weight row in L2; weights depend on no kernel, so this precedes the wait."""
    row = tl.minimum(first_row + tl.arange(0, ROWS), N - 1).to(tl.int64)
    address = w_ptr.to(tl.int64) + row * row_bytes + begin_byte
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
        "=r,l,r",
        [address, tl.zeros([ROWS], tl.int32) + num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def add_partials(acc, partial_ptr, counter_ptr, tile, split, offsets, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """Publish this program's sums; return (sum over splits, 1) in the last program of the tile, else (own sum, 0)."""
    base = partial_ptr + tile * (SPLITS * SIZE)
    tl.store(base + split * SIZE + offsets, acc)
    tl.debug_barrier()  # all threads' stores precede the release below
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    is_last = arrived == SPLITS - 1
    if is_last:
        acc = tl.load(base + offsets, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(base + other * SIZE + offsets, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    return acc, is_last


@triton.jit(do_not_specialize=["M", "k_per_split", "prefetch_bytes"])
def _gemm_kernel(
    x_ptr,
    w_ptr,
    w_map,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    k_per_split,
    prefetch_bytes,
    x_stride,
    y_stride,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    k_begin = split * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)
    if OVERLAP:  # noqa: SIM102 - compile-time condition
        if prefetch_bytes > 0:
            BYTES: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
            size = tl.minimum(prefetch_bytes, (k_end - k_begin) * BYTES)
            prefetch_rows(w_ptr, tile * BLOCK_N, N, K * BYTES, k_begin * BYTES, size, BLOCK_N)
    wait_for_inputs(OVERLAP)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k0 in range(k_begin, k_end, BLOCK_K):
        ks = k0 + k
        x_ptrs = x_ptr + m[None, :] * x_stride + ks[:, None]
        x_mask = m[None, :] < M
        if not EVEN_K:
            x_mask &= ks[:, None] < k_end
        if w_map is not None:
            w = w_map.load([tile * BLOCK_N, k0])  # past the matrix: zeros
        elif EVEN_K:
            w = tl.load(w_ptr + rows[:, None] * K + ks[None, :])
        else:
            w = tl.load(w_ptr + rows[:, None] * K + ks[None, :], mask=ks[None, :] < k_end, other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")

    writes = True
    if SPLITS > 1:
        offsets = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        acc, writes = add_partials(acc, partial_ptr, counter_ptr, tile, split, offsets, SPLITS, BLOCK_N * BLOCK_M)
    if w_scale_ptr is not None:
        acc *= tl.load(w_scale_ptr + rows)[:, None]
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    tl.store(
        y_ptr + m[None, :] * y_stride + n[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=(m[None, :] < M) & (n[:, None] < N) & writes,
    )


def choose_tiling(n: int, k: int, element_bytes: int) -> Tiling:
    """Pick tiles so that all programs run at once and each SM has enough loads in flight (see docs/kernels.md)."""
    block_k = 128 // element_bytes if k % (128 // element_bytes) == 0 else 64
    programs = ceil_div(n, 64)
    splits = 1
    while splits < 8 and programs * splits * 2 <= 4 * HOPPER_SMS and k // (splits * 2) >= 4 * block_k:
        splits *= 2
    return Tiling(64, block_k, splits)


def small_gemm(
    x_MK: Tensor,
    w_NK: Tensor,
    *,
    x_scale_M: Tensor | None = None,
    w_scale_N: Tensor | None = None,
    bias_N: Tensor | None = None,
    out_MN: Tensor | None = None,
    tiling: Tiling | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply up to `MAX_ROWS` rows by w^T: y = (x @ w^T) * x_scale * w_scale + bias, accumulated in float32.

    ``w_NK`` is contiguous, ``x_MK`` has contiguous rows and the same type. Scales are float32, each optional.
    The result has the type of ``out_MN``, by default that of ``x_MK`` (bfloat16 for float8).
    """
    rows, k = x_MK.shape
    n = w_NK.shape[0]
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"small_gemm takes 1 to {MAX_ROWS} rows, got {rows}")
    tiling = tiling or choose_tiling(n, k, w_NK.element_size())
    if out_MN is None:
        dtype = torch.bfloat16 if x_MK.dtype.itemsize == 1 else x_MK.dtype
        out_MN = torch.empty(rows, n, dtype=dtype, device=x_MK.device)
    block_m = tiling.block_m(rows)
    tiles = ceil_div(n, tiling.block_n)
    k_per_split = ceil_div(ceil_div(k, tiling.splits), tiling.block_k) * tiling.block_k
    workspace = workspace or default_workspace(x_MK.device)
    if tiling.splits > 1:
        workspace.require(tiles * tiling.splits * tiling.block_n * block_m, tiles)
    overlap = overlaps_launches(x_MK.device)
    _gemm_kernel[(tiles, tiling.splits)](
        x_MK,
        w_NK,
        TensorDescriptor.from_tensor(w_NK, [tiling.block_n, tiling.block_k]) if tiling.bulk else None,
        x_scale_M,
        w_scale_N,
        bias_N,
        out_MN,
        workspace.partials,
        workspace.counters,
        rows,
        n,
        k,
        k_per_split,
        tiling.prefetch_per_row(k_per_split * w_NK.element_size()) if k % 16 == 0 else 0,
        x_MK.stride(0),
        out_MN.stride(0),
        tiling.splits,
        block_m,
        tiling.block_n,
        tiling.block_k,
        k % tiling.block_k == 0,
        overlap,
        **launch_options(x_MK.device, tiling.num_warps, tiling.num_stages),
    )
    return out_MN
