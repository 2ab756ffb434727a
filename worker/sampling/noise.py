"""Randomness that depends on (seed, position, token id) and on nothing else.

So a request gets the same tokens in any batch, on any number of ranks (each makes the noise of its own vocabulary
slice), and after a restart. All arithmetic is on 32-bit integers that wrap around:

    mix(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16      (murmur3's finalizer)
    key(seed, position) = mix(mix(mix(seed_low + 0x9E3779B9) ^ seed_high) ^ position)
    bits(token)         = mix(key ^ (token * 0x9E3779B1))
    v                   = min((bits >> 1) * 2**-31 + 2**-32, 1 - 2**-24)                           (fp32)
    gumbel(token)       = -log(-log1p(-v))

The arg-max of ``logits / temperature + gumbel`` is a draw from the softmax. Small ``v`` are the winners, and
fp32 is dense near zero, so unlikely tokens keep their probability; the upper bound keeps the noise finite.
"""

# S rows that sample, V tokens of a vocabulary slice

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return the int32 that has the bits of an unsigned constant."""
    return value - (1 << 32) if value >= 1 << 31 else value


_SEED_OFFSET = _signed(0x9E3779B9)
_TOKEN_FACTOR = _signed(0x9E3779B1)
_MIX_1 = _signed(0x85EBCA6B)
_MIX_2 = _signed(0xC2B2AE35)
_CPU_CHUNK = 1 << 16
_GPU_CHUNK = 1 << 24


def row_keys(seeds_S2: Tensor, positions_S: Tensor) -> Tensor:
    """Return int32 keys [S] of the two halves of each seed (int32, low first) and the positions to choose for."""
    key_S = _mix(seeds_S2[:, 0] + _SEED_OFFSET)
    key_S = _mix(key_S ^ seeds_S2[:, 1])
    return _mix(key_S ^ positions_S.to(torch.int32))


def token_factors(first_id: int, count: int, device: torch.device) -> Tensor:
    """Return the tokens' part of the hash for ids from ``first_id`` on, int32 [V]; callers keep it."""
    return torch.arange(first_id, first_id + count, dtype=torch.int32, device=device) * _TOKEN_FACTOR


def gumbel(keys_S: Tensor, factors_V: Tensor) -> Tensor:
    """Return standard Gumbel noise, fp32 [S, V]."""
    bits_SV = _mix(keys_S[:, None] ^ factors_V)
    v_SV = ((bits_SV >> 1) & 0x7FFFFFFF).to(torch.float32).mul_(2.0**-31).add_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return v_SV.neg_().log1p_().neg_().log_().neg_()


def add_gumbel(z_SV: Tensor, keys_S: Tensor, factors_V: Tensor) -> Tensor:
    """Add standard Gumbel noise in place, some rows at a time: to stay in a CPU's cache, or to bound a GPU's memory."""
    step = max(1, (_CPU_CHUNK if z_SV.device.type == "cpu" else _GPU_CHUNK) // max(1, len(factors_V)))
    for start in range(0, len(z_SV), step):
        z_SV[start : start + step] += gumbel(keys_S[start : start + step], factors_V)
    return z_SV


def _mix(h: Tensor) -> Tensor:
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h.mul_(_MIX_1)
    h ^= (h >> 13) & 0x7FFFF
    h = h.mul_(_MIX_2)
    h ^= (h >> 16) & 0xFFFF
    return h
