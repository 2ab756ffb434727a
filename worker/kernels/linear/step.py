# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""One token of the gated delta rule for each row that decodes, and the gated norm of the head's output.

One program takes one head of one row. The state is read and written once, and it is all that a step costs: 64 KiB of a
head of 128 x 128. The rule is in rule.py.

The state is read before the wait for the kernel before. Only the last step, or the copies before this one, can have
written it, and each step begins with a copy of its rows to the device, which waits for all kernels of the last one.
"""

# R rows, H value heads, K key dim, V value dim

import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.linear.inputs import RuleInputs, RuleWeights, StateRows
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, wait_for_inputs


@triton.jit
def log_fading(a, bias, log_rate):
    """Return g: minus the rate times softplus(a + bias)."""
    x = a.to(tl.float32) + bias
    return -tl.exp(log_rate) * tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _step_kernel(
    mixed_ptr, rates_ptr, gates_ptr, state_ptr, out_ptr, norm_ptr, bias_ptr, log_rate_ptr, rows_ptr, lens_ptr,
    mixed_stride, rates_stride, gates_stride, state_stride, HEADS, KEYS, scale, eps,
    SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    key = tl.arange(0, K)
    value = tl.arange(0, V)
    bias, log_rate = tl.load(bias_ptr + head), tl.load(log_rate_ptr + head)
    norm = tl.load(norm_ptr + value).to(tl.float32)
    state_ptr += tl.load(rows_ptr + r).to(tl.int64) * state_stride + head * (K * V)
    places = key[:, None] * V + value[None, :]
    state = tl.load(state_ptr + places)
    wait_for_inputs(OVERLAP)
    context = tl.load(lens_ptr + r)
    out_ptr += (r * HEADS + head) * V
    if context == 0:  # padding of a graph
        tl.store(out_ptr + value, tl.zeros([V], out_ptr.dtype.element_ty))
        return
    state = tl.where((context > 1) & (places >= 0), state, 0.0)  # what a new row finds is another's, or NaN
    mixed_ptr += r * mixed_stride
    q = tl.load(mixed_ptr + head // SHARED * K + key).to(tl.float32)
    k = tl.load(mixed_ptr + (KEYS + head // SHARED) * K + key).to(tl.float32)
    v = tl.load(mixed_ptr + 2 * KEYS * K + head * V + value).to(tl.float32)
    q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
    k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    beta = tl.sigmoid(tl.load(rates_ptr + r * rates_stride + head).to(tl.float32))
    g = log_fading(tl.load(rates_ptr + r * rates_stride + HEADS + head), bias, log_rate)
    state = state * tl.exp(g)
    change = (v - tl.sum(state * k[:, None], 0)) * beta
    state = state + k[:, None] * change[None, :]
    tl.store(state_ptr + places, state)
    out = tl.sum(state * q[:, None], 0)
    gate = tl.load(gates_ptr + r * gates_stride + head * V + value).to(tl.float32)
    out = out * tl.rsqrt(tl.sum(out * out, 0) / V + eps) * norm * gate * tl.sigmoid(gate)
    tl.store(out_ptr + value, out.to(out_ptr.dtype.element_ty))


def rule_step(
    mixed_TC: Tensor, inputs: RuleInputs, state_NHKV: Tensor, weights: RuleWeights, rows: StateRows, out_THV: Tensor
) -> None:
    """Write the gated and normalized outputs of rows that each have one token, the first ones; change their states.

    Rows that are left out yield zeros.
    """
    heads, keys, device = weights.value_heads, weights.key_heads, mixed_TC.device
    dims = weights.key_dim, weights.value_dim
    _step_kernel[(heads, len(rows.lens_R))](
        mixed_TC, inputs.rates_T2H, inputs.gates_THV, state_NHKV, out_THV,
        weights.norm_V, weights.bias_H, weights.log_rate_H, rows.rows_R, rows.lens_R,
        mixed_TC.stride(0), inputs.rates_T2H.stride(0), inputs.gates_THV.stride(0), state_NHKV.stride(0), heads, keys,
        weights.key_dim**-0.5, weights.eps, heads // keys, *dims, overlaps_launches(device),
        **launch_options(device, 8 if dims[0] * dims[1] >= 1 << 13 else 4),
    )  # fmt: skip
