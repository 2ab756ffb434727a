# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Multiply by sigmoids: heads of attention by their gates, and a shared network's output by each token's share."""

# T tokens, N components of all heads, D model dim

import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

_BLOCK = 1024


@triton.jit
def _heads_kernel(heads_ptr, gates_ptr, scale_ptr, N, gates_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    gate = tl.load(gates_ptr + row * gates_stride + n, mask=n < N, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        gate *= tl.load(scale_ptr + row)
    head = tl.load(heads_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(heads_ptr + row * N + n, (head * tl.sigmoid(gate)).to(heads_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _share_kernel(
    y_ptr, shared_ptr, x_ptr, weight_ptr, D, y_stride, shared_stride, x_stride,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(tl.sum(x * weight, 0))
    shared = tl.load(shared_ptr + row * shared_stride + d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * y_stride + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_stride + d, (y + share * shared).to(y_ptr.dtype.element_ty), mask=mask)


def gate_heads(heads_TN: Tensor, gates_TN: Tensor, scale_T: Tensor | None = None) -> Tensor:
    """Multiply heads by the sigmoids of their gates in place and return them.

    ``scale_T`` (float32): what the gates of each token lack.
    """
    tokens, width = heads_TN.shape
    block = min(_BLOCK, power_of_2(width))
    _heads_kernel[(tokens, ceil_div(width, block))](
        heads_TN, gates_TN, scale_T, width, gates_TN.stride(0), block, overlaps_launches(heads_TN.device),
        **launch_options(heads_TN.device, 4),
    )  # fmt: skip
    return heads_TN


def add_share(y_TD: Tensor, shared_TD: Tensor, x_TD: Tensor, weight_1D: Tensor) -> Tensor:
    """Add ``sigmoid(x . weight)`` times ``shared`` to ``y`` in place and return it."""
    tokens, width = y_TD.shape
    _share_kernel[(tokens,)](
        y_TD, shared_TD, x_TD, weight_1D, width, y_TD.stride(0), shared_TD.stride(0), x_TD.stride(0),
        power_of_2(width), overlaps_launches(y_TD.device), **launch_options(y_TD.device, 4),
    )  # fmt: skip
    return y_TD
