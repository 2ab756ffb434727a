# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""The parts of `decode_attention`'s programs: attend to a stretch of a context, and merge stretches."""

import triton
import triton.language as tl

from mgpu.worker.kernels.attention.inputs import LOG2_E as _LOG2_E
from mgpu.worker.kernels.products.widen import widen_fp8_pairs

LOG2_E = tl.constexpr(_LOG2_E)


@triton.jit
def attend(
    q, k_ptr, v_ptr, table_ptr, first, begin, end, scale, block_stride, token_stride,
    GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return (weighted values, running maximum, sum of weights) over the tokens [begin, end) of one KV head.

    ``begin`` is a multiple of BLOCK_N; tokens before ``first`` are left out.
    """
    d = tl.arange(0, HEAD_DIM)
    acc = tl.zeros([GROUP_PAD, HEAD_DIM], tl.float32)
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = (n < end) & (n >= first)
        if BLOCK_SIZE % BLOCK_N == 0:  # the tile is in one page
            page = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        else:
            page = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
        offsets = (page * block_stride + (n % BLOCK_SIZE) * token_stride)[:, None] + d[None, :]
        # Masked, not merely ignored: values past the context may be NaN, and 0 * NaN is NaN.
        k = tl.load(k_ptr + offsets, mask=valid[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + offsets, mask=valid[:, None], other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit
def attend_pairs(
    q_even, q_odd, k_ptr, v_ptr, table_ptr, first, begin, end, scale, block_stride, token_stride,
    GROUP_PAD: tl.constexpr, HALF_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Like `attend` for a cache of int16 words with two e4m3 values; even and odd dimensions are apart."""
    d = tl.arange(0, HALF_DIM)
    acc_even = tl.zeros([GROUP_PAD, HALF_DIM], tl.float32)
    acc_odd = tl.zeros([GROUP_PAD, HALF_DIM], tl.float32)
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = (n < end) & (n >= first)
        if BLOCK_SIZE % BLOCK_N == 0:
            page = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        else:
            page = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
        offsets = (page * block_stride + (n % BLOCK_SIZE) * token_stride)[:, None] + d[None, :]
        k_even, k_odd = widen_fp8_pairs(tl.trans(tl.load(k_ptr + offsets, mask=valid[:, None], other=0)), ASSEMBLY)
        scores = tl.dot(q_even, k_even, input_precision="ieee")
        scores = tl.dot(q_odd, k_odd, scores, input_precision="ieee") * scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        v_even, v_odd = widen_fp8_pairs(tl.load(v_ptr + offsets, mask=valid[:, None], other=0), ASSEMBLY)
        weights = weights.to(tl.float16)
        acc_even = tl.dot(weights, v_even, acc_even * shrink[:, None], input_precision="ieee")
        acc_odd = tl.dot(weights, v_odd, acc_odd * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc_even, acc_odd, peak, total


@triton.jit
def with_sinks(sinks_ptr, heads, mask, peak, total):
    """Return (factor of the sums, sum of weights) once each head's sink, a score beside those of keys, counts too."""
    sink = tl.load(sinks_ptr + heads, mask=mask, other=float("-inf")).to(tl.float32) * LOG2_E
    new_peak = tl.maximum(peak, sink)
    known = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # padding heads: no -inf minus -inf
    shrink = tl.exp2(peak - known)
    return shrink, total * shrink + tl.exp2(sink - known)


@triton.jit
def combine(
    out_ptr, acc_ptr, stat_ptr, count, v_scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr, sinks_ptr=None,
):  # fmt: skip
    """Merge ``count`` stretches, always in the same order, and write the result. HEADS is GROUP's power of two."""
    s = tl.arange(0, AT_ONCE)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, HEAD_DIM)
    acc = tl.zeros([HEADS, HEAD_DIM], tl.float32)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in range(0, count, AT_ONCE):
        mask = (start + s < count)[:, None] & (g < GROUP)[None, :]
        row = (start + s)[:, None] * GROUP + g[None, :]
        peaks = tl.load(stat_ptr + row * 2, mask=mask, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stat_ptr + row * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
        values = tl.load(
            acc_ptr + row[:, :, None] * HEAD_DIM + d[None, None, :],
            mask=mask[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        known = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # padding heads: no -inf minus -inf
        weights = tl.exp2(peaks - known[None, :])
        shrink = tl.exp2(peak - known)
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        total = total * shrink + tl.sum(totals * weights, 0)
        peak = new_peak
    factor = v_scale
    if sinks_ptr is not None:
        shrink, total = with_sinks(sinks_ptr, g, g < GROUP, peak, total)
        factor *= shrink
    out = acc * (factor / tl.where(total > 0.0, total, 1.0))[:, None]
    tl.store(out_ptr + g[:, None] * HEAD_DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=(g < GROUP)[:, None])
