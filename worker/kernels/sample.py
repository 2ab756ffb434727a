# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Choose tokens from one rank's slice of the vocabulary: greedy, or by Gumbel noise for rows with a temperature.

The noise is that of `mgpu.worker.sampling.noise`: it depends on (seed, position, global token id) alone, so ranks and
layouts agree. Two kernels: the best token of each stretch of the vocabulary, then the best of those.
Equal values go to the lowest id.
"""

# S rows that sample, V tokens of this rank's slice, C stretches

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.internal.worker_messages import GREEDY_BELOW
from mgpu.worker.kernels.runtime import (
    INTERPRETED,
    ceil_div,
    launch_options,
    overlaps_launches,
    power_of_2,
    wait_for_inputs,
)

STRETCH = 4096
"""Logits per program."""
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)


@triton.jit
def _mix(h):
    """Scramble 32 bits (murmur3's finalizer)."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _log(x, ASSEMBLY: tl.constexpr):
    """Return log(x) in one instruction, with an absolute error of 2^-22; Triton's own takes forty."""
    if ASSEMBLY:
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        log2 = tl.log2(x)
    return log2 * 0.6931471805599453


@triton.jit
def _minus_log1p_minus(v, ASSEMBLY: tl.constexpr):
    """Return -log(1 - v), also for small v, which are the winners of the draw."""
    series = v * (1.0 + v * (0.5 + v * (0.3333333333 + v * (0.25 + v * 0.2))))
    return tl.where(v < 0.03125, series, -_log(1.0 - v, ASSEMBLY))


@triton.jit
def _first_best(scores, ids):
    """Return the largest score and the lowest id that has it."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, ids, 2147483647), 0)


@triton.jit
def _stretch_kernel(
    logits_ptr, temperatures_ptr, seeds_ptr, rows_ptr, positions_ptr, best_ptr, ids_ptr,
    V, first_id, logits_stride, temperatures_stride, seeds_stride,
    BLOCK: tl.constexpr, GREEDY: tl.constexpr, OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    stretch = tl.program_id(1)
    local = stretch * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    scores = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + local, mask=local < V, other=float("-inf"))
    scores = scores.to(tl.float32)
    token = first_id + local
    if not GREEDY:
        owner = tl.load(rows_ptr + row).to(tl.int64)
        temperature = tl.load(temperatures_ptr + owner * temperatures_stride)
        if temperature >= _GREEDY_BELOW:
            low = tl.load(seeds_ptr + owner * seeds_stride).to(tl.uint32, bitcast=True)
            high = tl.load(seeds_ptr + owner * seeds_stride + 1).to(tl.uint32, bitcast=True)
            key = _mix(_mix(_mix(low + 0x9E3779B9) ^ high) ^ tl.load(positions_ptr + row).to(tl.uint32))
            bits = _mix(key ^ (token.to(tl.uint32) * 0x9E3779B1))
            v = (bits >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
            scores = scores / temperature - _log(
                _minus_log1p_minus(tl.minimum(v, 0.9999999403953552), ASSEMBLY), ASSEMBLY
            )
    best, chosen = _first_best(scores, token)
    place = row * tl.num_programs(1) + stretch
    tl.store(best_ptr + place, best)
    tl.store(ids_ptr + place, chosen)


@triton.jit
def _pick_kernel(
    best_ptr, ids_ptr, rows_ptr, positions_ptr, value_out_ptr, id_out_ptr, tokens_ptr,
    tokens_stride, COUNT, last_id,
    PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.arange(0, PADDED)
    wait_for_inputs(OVERLAP)
    values = tl.load(best_ptr + row * COUNT + c, mask=c < COUNT, other=float("-inf"))
    ids = tl.load(ids_ptr + row * COUNT + c, mask=c < COUNT, other=2147483647)
    best, chosen = _first_best(values, ids)
    chosen = tl.minimum(chosen, last_id)  # all logits are NaN: a token that exists
    tl.store(value_out_ptr + row, best)
    tl.store(id_out_ptr + row, chosen)
    if tokens_ptr is not None:
        owner = tl.load(rows_ptr + row).to(tl.int64)
        position = tl.load(positions_ptr + row)
        # No token is ever chosen for position 0: such rows only fill up a graph's batch.
        tl.store(tokens_ptr + owner * tokens_stride + position, chosen, mask=position > 0)


def sample(
    logits_SV: Tensor,
    *,
    first_id: int = 0,
    rows_S: Tensor | None = None,
    positions_S: Tensor | None = None,
    temperatures: Tensor | None = None,
    seeds: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best score, float32 [S], and its global token id, int32 [S], within this rank's slice.

    ``temperatures`` float32 and ``seeds`` int32 [.., 2], of any row stride, belong to persistent rows; ``rows_S`` are
    their numbers, ``positions_S`` the positions that the tokens are chosen for. Without temperatures all rows are
    greedy. With ``tokens``, int32 [rows, positions], the choice is also written there, where the next step reads it
    (for one rank only: another may have a better candidate), except for position 0, which marks padding.
    """
    count, vocab = logits_SV.shape
    if temperatures is not None and (rows_S is None or positions_S is None or seeds is None):
        raise ValueError("rows with temperatures need rows_S, positions_S and seeds too")
    device = logits_SV.device
    stretches = ceil_div(vocab, STRETCH)
    best = torch.empty(count, stretches, dtype=torch.float32, device=device)
    ids = torch.empty(count, stretches, dtype=torch.int32, device=device)
    overlap = overlaps_launches(device)
    _stretch_kernel[(count, stretches)](
        logits_SV, temperatures, seeds, rows_S, positions_S, best, ids,
        vocab, first_id, logits_SV.stride(0), _row_stride(temperatures), _row_stride(seeds),
        STRETCH, temperatures is None, overlap, not INTERPRETED,
        **launch_options(device, 8),
    )  # fmt: skip
    value_S = torch.empty(count, dtype=torch.float32, device=device)
    id_S = torch.empty(count, dtype=torch.int32, device=device)
    _pick_kernel[(count,)](
        best, ids, rows_S, positions_S, value_S, id_S, tokens,
        _row_stride(tokens), stretches, first_id + vocab - 1,
        power_of_2(stretches), overlap,
        **launch_options(device, 1),
    )  # fmt: skip
    return value_S, id_S


def _row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
