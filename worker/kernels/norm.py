# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""RMSNorm, alone or fused with the residual add before it; for float8 products it can quantize its result too.

One program per row, the row in registers: each element is read once and written once.
"""

# T tokens, D model dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs

E4M3_MAX = 448.0


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    x_weight_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    D,
    x_stride,
    residual_stride,
    eps,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    if x_weight_ptr is not None:
        x = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * tl.load(x_weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        dtype = residual_ptr.dtype.element_ty
        # The sum is rounded to the stream's type before it is normalized, as it is without fusion.
        total = tl.load(residual_ptr + row * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
        total = (total + x.to(dtype).to(tl.float32)).to(dtype)
        tl.store(residual_ptr + row * residual_stride + d, total, mask=mask)
        x = total.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    if scale_ptr is not None:
        scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / 448.0
        tl.store(scale_ptr + row, scale)
        y = y / scale
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    x_weight_D: Tensor | None,
    weight_D: Tensor,
    eps: float,
    scale_T: Tensor | None,
) -> Tensor:
    tokens, dim = x_TD.shape
    dtype = x_TD.dtype if scale_T is None else torch.float8_e4m3fn
    out_TD = torch.empty(tokens, dim, dtype=dtype, device=x_TD.device)
    block = power_of_2(dim)
    _norm_kernel[(tokens,)](
        x_TD,
        residual_TD,
        x_weight_D,
        weight_D,
        out_TD,
        scale_T,
        dim,
        x_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        eps,
        block,
        overlaps_launches(x_TD.device),
        **launch_options(x_TD.device, min(16, max(1, block // 512))),
    )
    return out_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Give x / sqrt(mean(x^2) + eps) * weight per row, computed in float32. Gemma's 1 is part of the weight."""
    return _launch(x_TD, None, None, weight_D, eps, None)


def add_rms_norm(
    residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, delta_weight_D: Tensor | None = None
) -> Tensor:
    """Add ``delta`` to ``residual`` in place and give the normalized sum.

    With ``delta_weight_D`` the delta is normalized by that weight before it is added (Gemma's post-norms).
    """
    return _launch(delta_TD, residual_TD, delta_weight_D, weight_D, eps, None)


def rms_norm_fp8(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Like `rms_norm`, as float8 e4m3 [T, D] and the scale of each row, float32 [T]."""
    scale_T = torch.empty(x_TD.shape[0], dtype=torch.float32, device=x_TD.device)
    return _launch(x_TD, None, None, weight_D, eps, scale_T), scale_T


def add_rms_norm_fp8(residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Like `add_rms_norm`, as float8 e4m3 [T, D] and the scale of each row, float32 [T]."""
    scale_T = torch.empty(delta_TD.shape[0], dtype=torch.float32, device=delta_TD.device)
    return _launch(delta_TD, residual_TD, None, weight_D, eps, scale_T), scale_T
