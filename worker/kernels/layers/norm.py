# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""RMSNorm, alone or fused with the residual add before it.

One program per row, the row in registers: each element is read once and written once.
"""

# T tokens, D model dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs


@triton.jit
def _norm_kernel(
    x_ptr,
    x_scale_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
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


def _launch(x_TD: Tensor, x_scale_T: Tensor | None, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    tokens, dim = x_TD.shape
    out_TD = torch.empty(tokens, dim, dtype=x_TD.dtype, device=x_TD.device)
    block = power_of_2(dim)
    _norm_kernel[(tokens,)](
        x_TD,
        x_scale_T,
        residual_TD,
        weight_D,
        out_TD,
        dim,
        x_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        eps,
        block,
        overlaps_launches(x_TD.device),
        **launch_options(x_TD.device, min(16, max(1, block // 512))),
    )
    return out_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, scale_T: Tensor | None = None) -> Tensor:
    """Give x / sqrt(mean(x^2) + eps) * weight per row, computed in float32. Gemma's 1 is part of the weight.

    With ``scale_T`` (float32) row t of x is multiplied by its scale first.
    """
    return _launch(x_TD, scale_T, None, weight_D, eps)


def add_rms_norm(
    residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, delta_scale_T: Tensor | None = None
) -> Tensor:
    """Add ``delta`` to ``residual`` in place and give the normalized sum.

    With ``delta_scale_T`` (float32) row t of ``delta`` is multiplied by its scale first.
    """
    return _launch(delta_TD, delta_scale_T, residual_TD, weight_D, eps)
