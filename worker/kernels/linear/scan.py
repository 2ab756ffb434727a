# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""The gated delta rule over prompts, in chunks of 64 tokens.

rule.py has the theory. With S the state before a chunk, its corrections are u - w S, where

    (1 + A) u = beta v    and    (1 + A) w = beta exp(G) k,    A[i, j] = beta_i exp(G_i - G_j) k_i k_j  for j < i

u and w do not depend on S. So one kernel computes them for all chunks side by side. Another one then goes through the
chunks of each row, head and range of values in order, and has five products in each. A third one normalizes and gates.

(1 + A) is inverted in blocks of 16: the blocks on the diagonal row by row, all four at once. With D their inverses and
M = D (A below the blocks), 1 / (1 + A) = (1 - M) (1 + M M) D exactly, since M has only three steps below the diagonal.
"""

# T tokens, R rows, H value heads, K key dim, V value dim, C tokens of a chunk

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.attention.prefill import find_row
from mgpu.worker.kernels.linear.inputs import RuleInputs, RuleWeights, StateRows
from mgpu.worker.kernels.linear.step import log_fading
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, shared_bytes, wait_for_inputs

CHUNK = 64
_ROWS_AT_ONCE = 256
_PRECISION = "tf32x3"
"""Of products of float32: three of tf32, which lose the last two bits or so. GPUs have no others in their tensor cores,
and a program of single multiplications took minutes to compile for heads of 128."""
_FLOATS_BYTES = 128 << 10
"""Shared memory that a chunk of heads of 128 takes in float32."""
_VALUES = 32
"""Values of a head that one program goes through a row with."""


@triton.jit
def _inverse(a, PRECISION: tl.constexpr, C: tl.constexpr):
    """Return the inverse of 1 + a, where a [C, C] is strictly lower triangular."""
    BLOCKS: tl.constexpr = C // 16
    n = tl.arange(0, C)
    same = (n[:, None] // 16) == (n[None, :] // 16)
    blocks = tl.sum(tl.reshape(tl.where(same, -a, 0.0), [BLOCKS, 16, BLOCKS, 16]), 2)
    i = tl.arange(0, 16)
    for row in range(1, 16):
        is_row = (i == row)[None, :, None]
        old = tl.sum(tl.where(is_row, blocks, 0.0), 1)
        new = old + tl.sum(old[:, :, None] * blocks, 1)
        blocks = tl.where(is_row, new[:, None, :], blocks)
    blocks = blocks + (i[:, None] == i[None, :]).to(tl.float32)[None, :, :]
    wide = tl.broadcast_to(blocks[:, :, None, :], [BLOCKS, 16, BLOCKS, 16])
    inverse = tl.where(same, tl.reshape(wide, [C, C]), 0.0)
    step = tl.dot(inverse, tl.where(same, 0.0, a), input_precision=PRECISION)
    right = inverse + tl.dot(tl.dot(step, step, input_precision=PRECISION), inverse, input_precision=PRECISION)
    return right - tl.dot(step, right, input_precision=PRECISION)


@triton.jit
def _unit_rows(x):
    x = x.to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 1) + 1e-6)[:, None]


@triton.jit
def _prepare_kernel(
    mixed_ptr, rates_ptr, bias_ptr, log_rate_ptr, starts_ptr, u_ptr, w_ptr, sums_ptr, num_rows,
    mixed_stride, rates_stride, HEADS, KEYS,
    SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, AT_ONCE: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    wait_for_inputs(OVERLAP)
    r = find_row(tile, starts_ptr, num_rows, C, AT_ONCE)
    start, end = tl.load(starts_ptr + r), tl.load(starts_ptr + r + 1)
    first = start + (tile - ((start - tl.load(starts_ptr)) // C + r)) * C
    if first >= end:
        return
    n = tl.arange(0, C)
    t = (first + n).to(tl.int64)
    exists = first + n < end
    key, value = tl.arange(0, K), tl.arange(0, V)
    rows_ptr = mixed_ptr + t[:, None] * mixed_stride
    k = tl.load(rows_ptr + (KEYS + head // SHARED) * K + key[None, :], mask=exists[:, None], other=0.0)
    v = tl.load(rows_ptr + 2 * KEYS * K + head * V + value[None, :], mask=exists[:, None], other=0.0)
    dtype = v.dtype
    k = _unit_rows(k)
    beta = tl.sigmoid(tl.load(rates_ptr + t * rates_stride + head, mask=exists, other=0.0).to(tl.float32))
    fading = tl.load(rates_ptr + t * rates_stride + HEADS + head, mask=exists, other=0.0)
    g = log_fading(fading, tl.load(bias_ptr + head), tl.load(log_rate_ptr + head))
    beta, g = tl.where(exists, beta, 0.0), tl.where(exists, g, 0.0)
    sums = tl.cumsum(g, 0)
    tl.store(sums_ptr + t * HEADS + head, sums, mask=exists)
    before = n[:, None] > n[None, :]
    left = tl.exp(tl.where(before, sums[:, None] - sums[None, :], 0.0))
    rounded = k.to(dtype)
    a = tl.dot(rounded, tl.trans(rounded), input_precision=PRECISION) * left * beta[:, None]
    inverse = _inverse(tl.where(before, a, 0.0), PRECISION, C).to(dtype)
    u = tl.dot(inverse, (v.to(tl.float32) * beta[:, None]).to(dtype), input_precision=PRECISION)
    w = tl.dot(inverse, (k * (beta * tl.exp(sums))[:, None]).to(dtype), input_precision=PRECISION)
    places = (t * HEADS + head)[:, None]
    tl.store(u_ptr + places * V + value[None, :], u.to(u_ptr.dtype.element_ty), mask=exists[:, None])
    tl.store(w_ptr + places * K + key[None, :], w.to(w_ptr.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _scan_kernel(
    mixed_ptr, u_ptr, w_ptr, sums_ptr, state_ptr, out_ptr, rows_ptr, lens_ptr, starts_ptr,
    mixed_stride, state_stride, HEADS, KEYS, scale,
    SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VALUES: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    part = tl.program_id(1)
    r = tl.program_id(2)
    wait_for_inputs(OVERLAP)
    start, end = tl.load(starts_ptr + r), tl.load(starts_ptr + r + 1)
    if start >= end:
        return
    has_state = tl.load(lens_ptr + r) > end - start
    key, n = tl.arange(0, K), tl.arange(0, C)
    value = part * VALUES + tl.arange(0, VALUES)
    state_ptr += tl.load(rows_ptr + r).to(tl.int64) * state_stride + head * (K * V)
    places = key[:, None] * V + value[None, :]
    state = tl.load(state_ptr + places, mask=has_state & (places >= 0), other=0.0)
    causal = n[:, None] >= n[None, :]
    for first in range(start, end, C):
        t = (first + n).to(tl.int64)
        exists = first + n < end
        row_ptr = mixed_ptr + t[:, None] * mixed_stride + key[None, :]
        q = tl.load(row_ptr + head // SHARED * K, mask=exists[:, None], other=0.0)
        k = tl.load(row_ptr + (KEYS + head // SHARED) * K, mask=exists[:, None], other=0.0)
        dtype = q.dtype
        q, k = _unit_rows(q) * scale, _unit_rows(k)
        at = (t * HEADS + head)[:, None]
        w = tl.load(w_ptr + at * K + key[None, :], mask=exists[:, None], other=0.0)
        u = tl.load(u_ptr + at * V + value[None, :], mask=exists[:, None], other=0.0)
        last = tl.minimum(first + C, end) - 1
        whole = tl.load(sums_ptr + last.to(tl.int64) * HEADS + head)
        sums = tl.load(sums_ptr + t * HEADS + head, mask=exists, other=0.0)
        sums = tl.where(exists, sums, whole)
        held = state.to(dtype)
        change = (u.to(tl.float32) - tl.dot(w, held, input_precision=PRECISION)).to(dtype)
        out = tl.dot((q * tl.exp(sums)[:, None]).to(dtype), held, input_precision=PRECISION)
        scores = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision=PRECISION)
        scores *= tl.exp(tl.where(causal, sums[:, None] - sums[None, :], 0.0))
        out = tl.dot(tl.where(causal, scores, 0.0).to(dtype), change, out, input_precision=PRECISION)
        tl.store(out_ptr + at * V + value[None, :], out.to(out_ptr.dtype.element_ty), mask=exists[:, None])
        faded = (k * tl.exp(whole - sums)[:, None]).to(dtype)
        state = tl.dot(tl.trans(faded), change, state * tl.exp(whole), input_precision=PRECISION)
    tl.store(state_ptr + places, state)


@triton.jit
def _gate_kernel(
    rule_ptr, gates_ptr, norm_ptr, out_ptr, owners_ptr, gates_stride, HEADS, eps,
    V: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.arange(0, V)
    norm = tl.load(norm_ptr + value).to(tl.float32)
    wait_for_inputs(OVERLAP)
    if tl.load(owners_ptr + t) < 0:
        return
    mask = (head < HEADS)[:, None] & (value >= 0)[None, :]
    places = head[:, None] * V + value[None, :]
    x = tl.load(rule_ptr + t * (HEADS * V) + places, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gates_ptr + t * gates_stride + places, mask=mask, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None] * norm[None, :] * gate * tl.sigmoid(gate)
    tl.store(out_ptr + t * (HEADS * V) + places, x.to(out_ptr.dtype.element_ty), mask=mask)


def rule_scan(
    mixed_TC: Tensor, inputs: RuleInputs, state_NHKV: Tensor, weights: RuleWeights, rows: StateRows, out_THV: Tensor
) -> None:
    """Write the gated and normalized outputs of all tokens of some rows, and change their states."""
    starts, device, dtype = rows.starts, mixed_TC.device, mixed_TC.dtype
    assert starts is not None, "prompts have starts"
    tokens, num_rows = len(mixed_TC), len(rows.lens_R)
    heads, keys, key_dim, value_dim = weights.value_heads, weights.key_heads, weights.key_dim, weights.value_dim
    u_THV = torch.empty((tokens, heads, value_dim), dtype=dtype, device=device)
    w_THK = torch.empty((tokens, heads, key_dim), dtype=dtype, device=device)
    sums_TH = torch.empty((tokens, heads), dtype=torch.float32, device=device)
    rule_THV = torch.empty_like(u_THV)
    overlap, shared = overlaps_launches(device), heads // keys
    is_tight = dtype.itemsize > 2 and shared_bytes(device) < _FLOATS_BYTES
    chunk = CHUNK // 2 if is_tight else CHUNK
    _prepare_kernel[(ceil_div(tokens, chunk) + num_rows, heads)](
        mixed_TC, inputs.rates_T2H, weights.bias_H, weights.log_rate_H, starts, u_THV, w_THK, sums_TH, num_rows,
        mixed_TC.stride(0), inputs.rates_T2H.stride(0), heads, keys,
        shared, key_dim, value_dim, chunk, _ROWS_AT_ONCE, _PRECISION, overlap,
        **launch_options(device, 4),
    )  # fmt: skip
    values = min(_VALUES, value_dim)
    stages = 2 if dtype.itemsize == 2 else 1  # a chunk of 128 x 128 in float32 has no room for the next one
    _scan_kernel[(heads, value_dim // values, num_rows)](
        mixed_TC, u_THV, w_THK, sums_TH, state_NHKV, rule_THV, rows.rows_R, rows.lens_R, starts,
        mixed_TC.stride(0), state_NHKV.stride(0), heads, keys, key_dim**-0.5,
        shared, key_dim, value_dim, values, chunk, _PRECISION, overlap,
        **launch_options(device, 4, stages),
    )  # fmt: skip
    block = max(1, 1024 // value_dim)
    _gate_kernel[(tokens, ceil_div(heads, block))](
        rule_THV, inputs.gates_THV, weights.norm_V, out_THV, rows.owners_T, inputs.gates_THV.stride(0), heads,
        weights.eps, value_dim, block, overlap, **launch_options(device, 4),
    )  # fmt: skip
