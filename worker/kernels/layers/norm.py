# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""RMSNorm, alone or fused with the residual add before it; the result is plain, or quantized for a float8 product.

One program per row, the row in registers: each element is read once and written once.
"""

# T tokens, D model dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.layers.float8_quantize import as_rows, empty_words, store_words, width_and_warps, word_channels
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs
from mgpu.worker.quantization.float8_rows import Float8Rows


@triton.jit
def _norm_kernel(
    x_ptr, x_scale_ptr, residual_ptr, weight_ptr, out_ptr, D, x_stride, residual_stride, eps,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    if x_scale_ptr is not None:
        x *= tl.load(x_scale_ptr + row)
    if residual_ptr is not None:
        dtype = residual_ptr.dtype.element_ty
        # The sum is rounded to the stream's type before it is normalized, as it is without fusion.
        total = tl.load(residual_ptr + row * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
        total = (total + x.to(dtype).to(tl.float32)).to(dtype)
        tl.store(residual_ptr + row * residual_stride + d, total, mask=mask)
        x = total.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normed_delta_kernel(
    y_ptr, y_scale_ptr, y_weight_ptr, residual_ptr, factor_ptr, weight_ptr, out_ptr, D, y_stride, residual_stride,
    y_eps, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    y_weight = tl.load(y_weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    dtype = residual_ptr.dtype.element_ty
    wait_for_inputs(OVERLAP)
    y = tl.load(y_ptr + row * y_stride + d, mask=mask, other=0.0).to(tl.float32)
    if y_scale_ptr is not None:
        y *= tl.load(y_scale_ptr + row)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + y_eps) * y_weight
    # Each result is rounded to the stream's type before the next operation, as it is without fusion.
    total = tl.load(residual_ptr + row * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
    total = (total + y.to(dtype).to(tl.float32)).to(dtype)
    if factor_ptr is not None:
        total = (total.to(tl.float32) * tl.load(factor_ptr).to(tl.float32)).to(dtype)
    tl.store(residual_ptr + row * residual_stride + d, total, mask=mask)
    if weight_ptr is not None:
        x = total.to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * D + d, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_float8_kernel(
    delta_ptr, delta_scale_ptr, residual_ptr, weight_ptr, words_ptr, scale_ptr,
    D, words_per_row, delta_stride, residual_stride, eps,
    WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
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


def _launch(x_TD: Tensor, x_scale_T: Tensor | None, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    tokens, dim = x_TD.shape
    out_TD = torch.empty(tokens, dim, dtype=x_TD.dtype, device=x_TD.device)
    block = power_of_2(dim)
    _norm_kernel[(tokens,)](
        x_TD, x_scale_T, residual_TD, weight_D, out_TD,
        dim, x_TD.stride(0), 0 if residual_TD is None else residual_TD.stride(0), eps,
        block, overlaps_launches(x_TD.device),
        **launch_options(x_TD.device, min(16, max(1, block // 512))),
    )  # fmt: skip
    return out_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, scale_T: Tensor | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight per row, computed in float32. Gemma's 1 is part of the weight.

    With ``scale_T`` (float32) row t of x is multiplied by its scale first.
    """
    return _launch(x_TD, scale_T, None, weight_D, eps)


def add_rms_norm(
    residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, delta_scale_T: Tensor | None = None
) -> Tensor:
    """Add ``delta`` to ``residual`` in place and return the normalized sum.

    With ``delta_scale_T`` (float32) row t of ``delta`` is multiplied by its scale first.
    """
    return _launch(delta_TD, delta_scale_T, residual_TD, weight_D, eps)


def add_normed(
    residual_TD: Tensor,
    y_TD: Tensor,
    y_weight_D: Tensor,
    y_eps: float,
    *,
    y_scale_T: Tensor | None = None,
    factor_1: Tensor | None = None,
    weight_D: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor | None:
    """Normalize ``y`` and add it to ``residual`` in place, which is multiplied by ``factor`` then.

    With ``weight_D`` return the normalized sum.
    """
    tokens, dim = y_TD.shape
    out_TD = None if weight_D is None else torch.empty(tokens, dim, dtype=y_TD.dtype, device=y_TD.device)
    block = power_of_2(dim)
    _normed_delta_kernel[(tokens,)](
        y_TD, y_scale_T, y_weight_D, residual_TD, factor_1, weight_D, out_TD,
        dim, y_TD.stride(0), residual_TD.stride(0), y_eps, eps, block, overlaps_launches(y_TD.device),
        **launch_options(y_TD.device, min(16, max(1, block // 512))),
    )  # fmt: skip
    return out_TD


def add_rms_norm_float8(
    residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, delta_scale_T: Tensor | None = None
) -> Float8Rows:
    """Add ``delta`` (times its rows' scales) to ``residual`` in place and return the normalized sum, quantized."""
    tokens, dim = residual_TD.shape
    words, scale_T = empty_words(tokens, dim, residual_TD.device)
    width, warps = width_and_warps(words.shape[1])
    _norm_float8_kernel[(tokens,)](
        delta_TD, delta_scale_T, residual_TD, weight_D, words, scale_T,
        dim, words.shape[1], delta_TD.stride(0), residual_TD.stride(0), eps,
        width, overlaps_launches(residual_TD.device),
        **launch_options(residual_TD.device, warps),
    )  # fmt: skip
    return as_rows(words, scale_T)
