# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Residual add and RMSNorm whose result goes into a float8 product: one pass, no bfloat16 copy of the result."""

# T tokens, D model dim

import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.layers.float8_quantize import as_rows, empty_words, store_words, width_and_warps, word_channels
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, wait_for_inputs
from mgpu.worker.quantization.float8_rows import Float8Rows


@triton.jit
def _norm_kernel(
    delta_ptr,
    delta_scale_ptr,
    residual_ptr,
    weight_ptr,
    words_ptr,
    scale_ptr,
    D,
    words_per_row,
    delta_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = word_channels(WIDTH)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    delta = tl.load(delta_ptr + row * delta_stride + d, mask=mask, other=0.0).to(tl.float32)
    if delta_scale_ptr is not None:
        delta *= tl.load(delta_scale_ptr + row)
    dtype = residual_ptr.dtype.element_ty
    # The sum is rounded to the stream's type before it is normalized, as it is without fusion.
    total = tl.load(residual_ptr + row * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
    total = (total + delta.to(dtype).to(tl.float32)).to(dtype)
    tl.store(residual_ptr + row * residual_stride + d, total, mask=mask)
    x = total.to(tl.float32)
    mean = tl.sum(tl.sum(x * x, 1), 0) / D
    store_words(x * tl.rsqrt(mean + eps) * weight, words_ptr, scale_ptr, row, words_per_row, WIDTH)


def add_rms_norm_float8(
    residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, delta_scale_T: Tensor | None = None
) -> Float8Rows:
    """Add ``delta`` (times its rows' scales) to ``residual`` in place and give the normalized sum, quantized."""
    tokens, dim = residual_TD.shape
    words, scale_T = empty_words(tokens, dim, residual_TD.device)
    width, warps = width_and_warps(words.shape[1])
    _norm_kernel[(tokens,)](
        delta_TD,
        delta_scale_T,
        residual_TD,
        weight_D,
        words,
        scale_T,
        dim,
        words.shape[1],
        delta_TD.stride(0),
        residual_TD.stride(0),
        eps,
        width,
        overlaps_launches(residual_TD.device),
        **launch_options(residual_TD.device, warps),
    )
    return as_rows(words, scale_T)
