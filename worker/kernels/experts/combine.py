# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Add up the rows that experts computed for each token, alone or in the kernel of the next norm."""

# T tokens, D model dim, P pairs, A active experts of a token

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs


@triton.jit
def _sum_of_rows(y_ptr, experts_ptr, token, d, first_expert, N, D, A: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of a token's rows in float32, without those of other ranks' experts."""
    total = tl.zeros([BLOCK], tl.float32)
    for a in tl.static_range(A):
        expert = tl.load(experts_ptr + token * A + a) - first_expert
        is_here = (expert >= 0) & (expert < N)
        total += tl.load(y_ptr + (token * A + a) * D + d, mask=(d < D) & is_here, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["first_expert"])
def _combine_kernel(
    y_ptr, experts_ptr, out_ptr, first_expert, N, D,
    A: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    total = _sum_of_rows(y_ptr, experts_ptr, token, d, first_expert, N, D, A, BLOCK)
    tl.store(out_ptr + token * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["first_expert"])
def _add_and_norm_kernel(
    y_ptr, experts_ptr, residual_ptr, weight_ptr, out_ptr, first_expert, N, D, residual_stride, eps,
    A: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    delta = _sum_of_rows(y_ptr, experts_ptr, token, d, first_expert, N, D, A, BLOCK)
    dtype = residual_ptr.dtype.element_ty
    # Both sums are rounded to the stream's type, as they are without fusion.
    total = tl.load(residual_ptr + token * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
    total = (total + delta.to(dtype).to(tl.float32)).to(dtype)
    tl.store(residual_ptr + token * residual_stride + d, total, mask=mask)
    x = total.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    tl.store(out_ptr + token * D + d, y.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class PairRows:
    """What experts computed for each pair of token and expert, [P, D], still to be added up for each token."""

    y_PD: Tensor
    experts_TA: Tensor
    first: int
    """The first expert of this rank, which has ``count`` of them. Rows of other ranks' experts are undefined."""
    count: int

    def total(self) -> Tensor:
        """Return the sum of each token's rows, [T, D]."""
        (tokens, active), dim = self.experts_TA.shape, self.y_PD.shape[1]
        out = torch.empty(tokens, dim, dtype=self.y_PD.dtype, device=self.y_PD.device)
        block = min(1024, power_of_2(dim))
        _combine_kernel[(tokens, ceil_div(dim, block))](
            self.y_PD, self.experts_TA, out, self.first, self.count, dim,
            active, block, overlaps_launches(out.device),
            **launch_options(out.device, 4),
        )  # fmt: skip
        return out

    def add_and_norm(self, residual_TD: Tensor, weight_D: Tensor, eps: float, in_float8: bool = False) -> Tensor:
        """Add the sums to ``residual`` in place and return the normalized stream, which is never quantized."""
        del in_float8
        (tokens, active), dim = self.experts_TA.shape, self.y_PD.shape[1]
        out = torch.empty(tokens, dim, dtype=self.y_PD.dtype, device=self.y_PD.device)
        block = power_of_2(dim)
        _add_and_norm_kernel[(tokens,)](
            self.y_PD, self.experts_TA, residual_TD, weight_D, out, self.first, self.count, dim,
            residual_TD.stride(0), eps,
            active, block, overlaps_launches(out.device),
            **launch_options(out.device, min(16, max(1, block // 512))),
        )  # fmt: skip
        return out
