# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Normalize the values of packed heads, without a weight (Gemma 4), in one kernel."""

# T tokens, A packed heads, J KV heads, K head dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs


@triton.jit
def _values_kernel(
    x_ptr, out_ptr, x_stride, out_stride, eps, first, values_from, shift, K,
    K_PAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = first + tl.program_id(1)
    k = tl.arange(0, K_PAD)
    mask = k < K
    is_value = head >= values_from
    source = tl.where(is_value, head - shift, head)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + token * x_stride + source * K + k, mask=mask, other=0.0)
    value = x.to(tl.float32)
    normed = (value * tl.rsqrt(tl.sum(value * value, 0) / K + eps)).to(x.dtype)
    tl.store(out_ptr + token * out_stride + head * K + k, tl.where(is_value, normed, x), mask=mask)


def with_normalized_values(heads_TAK: Tensor, num_q: int, num_kv: int, eps: float) -> Tensor:
    """Return packed heads whose values are normalized: the same memory, if they have values already.

    Heads that lack values get those of their keys.
    """
    tokens, stored, dim = heads_TAK.shape
    num_qk = num_q + num_kv
    has_values = stored > num_qk
    out_TAK = heads_TAK
    if not has_values:
        out_TAK = torch.empty(tokens, num_qk + num_kv, dim, dtype=heads_TAK.dtype, device=heads_TAK.device)
    first = num_qk if has_values else 0
    _values_kernel[(tokens, num_qk + num_kv - first)](
        heads_TAK, out_TAK, heads_TAK.stride(0), out_TAK.stride(0), eps, first, num_qk, 0 if has_values else num_kv,
        dim, power_of_2(dim), overlaps_launches(heads_TAK.device), **launch_options(heads_TAK.device, 1),
    )  # fmt: skip
    return out_TAK
