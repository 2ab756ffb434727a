# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""The projections of a single decoding row, and the short convolution over those that are its inputs.

A channel of the convolution needs one output of the product and what its row keeps of this channel. So the program that
has the output computes the convolution too, which saves a kernel per layer. `products/gemv.py` has the product itself,
and `step.py` says why what a row keeps may be read before the wait.
"""

# K model dim, N outputs of the projections, C channels of the convolution, which are the first outputs, W its inputs

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.linear.inputs import StateRows
from mgpu.worker.kernels.products.gemv import GemvTiling, choose_tiling
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs


@triton.jit
def _project_kernel(
    x_ptr, w_ptr, conv_ptr, tail_ptr, rows_ptr, lens_ptr, out_ptr, N, K, C, tail_stride,
    W: tl.constexpr, KEPT_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows_w_ptr = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    w = tl.load(rows_w_ptr + k[None, :], mask=(k < K)[None, :], other=0.0)
    j = tl.arange(0, KEPT_PAD)
    is_channel = n < C
    mask = (j < W - 1)[:, None] & is_channel[None, :]
    factors = tl.load(conv_ptr + n[None, :] * W + j[:, None], mask=mask, other=0.0).to(tl.float32)
    last = tl.load(conv_ptr + n * W + W - 1, mask=is_channel, other=0.0).to(tl.float32)
    tail_ptr += tl.load(rows_ptr).to(tl.int64) * tail_stride
    kept = tl.load(tail_ptr + j[:, None] * C + n[None, :], mask=mask, other=0.0)
    wait_for_inputs(OVERLAP)
    context = tl.load(lens_ptr)
    kept = tl.where(mask & (context > 1), kept, 0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + k
        if k0 > 0:
            w = tl.load(rows_w_ptr + ks[None, :], mask=(ks < K)[None, :], other=0.0)
        x = tl.load(x_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
    new = tl.sum(acc, 1).to(out_ptr.dtype.element_ty)
    total = tl.sum(kept.to(tl.float32) * factors, 0) + new.to(tl.float32) * last
    mixed = (total * tl.sigmoid(total)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n, tl.where(is_channel, mixed, new), mask=n < N)
    is_row = context > 0
    tl.store(tail_ptr + (j[:, None] - 1) * C + n[None, :], kept, mask=mask & (j > 0)[:, None] & is_row)
    tl.store(tail_ptr + (W - 2) * C + n, new.to(tail_ptr.dtype.element_ty), mask=is_channel & is_row)


def project_and_convolve(
    x_1K: Tensor,
    w_NK: Tensor,
    conv_CW: Tensor,
    tail_NWC: Tensor,
    rows: StateRows,
    tiling: GemvTiling | None = None,
) -> Tensor:
    """Return the product [1, N] of a row that decodes, whose first C columns are convolved; replace what it keeps."""
    (outputs, k), (channels, width), device = w_NK.shape, conv_CW.shape, x_1K.device
    tiling = tiling or choose_tiling(outputs, k, False)
    out_1N = torch.empty(1, outputs, dtype=x_1K.dtype, device=device)
    _project_kernel[(ceil_div(outputs, tiling.block_n),)](
        x_1K, w_NK, conv_CW, tail_NWC, rows.rows_R, rows.lens_R, out_1N, outputs, k, channels, tail_NWC.stride(0),
        width, power_of_2(width - 1), tiling.block_n, min(tiling.block_k, power_of_2(k)), overlaps_launches(device),
        **launch_options(device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_1N
