"""The gated delta rule in plain torch, which kernels are tested against. All arithmetic is in float32.

A head's state S [K, V] maps keys to values. Each token first lets it fade by exp(g), g <= 0. Then it moves what S says
of the token's key by the share beta towards the token's value, and reads S at its query:

    S = exp(g) * S;    S = S + outer(k, beta * (v - S^T k));    out = S^T q

A chunk of tokens is computed at once. With G the running sums of g inside the chunk and S the state before it, the
corrections u_i = beta_i * (v_i - S_i^T k_i) of the chunk's tokens depend on each other:

    u_i = beta_i * (v_i - exp(G_i) S^T k_i - sum over j < i of exp(G_i - G_j) (k_i k_j) u_j)

That is a triangular system, which is solved as one. The rest follows from u by products. Keys and queries have length
one (times K ** -0.5 for queries), so nothing overflows: all exponents are at most 0.
"""

# T tokens, R rows of one token each, H value heads, G key heads, K key dim, V value dim, C tokens of a chunk

import torch
from torch import Tensor

CHUNK = 64
"""Tokens that are computed at once."""
_EPS = 1e-6


def unit_length(x: Tensor) -> Tensor:
    """Return float32 vectors of length one along the last dimension."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS)


def queries_and_keys(q: Tensor, k: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return normalized queries and keys [..., H, K] of heads [..., G, K], each for the value heads that share it."""
    shared = num_heads // q.shape[-2]
    q, k = unit_length(q) * q.shape[-1] ** -0.5, unit_length(k)
    return q.repeat_interleave(shared, -2), k.repeat_interleave(shared, -2)


def step(q_RHK: Tensor, k_RHK: Tensor, v_RHV: Tensor, g_RH: Tensor, beta_RH: Tensor, state_RHKV: Tensor) -> Tensor:
    """Compute one token of each row; return outputs [R, H, V] and change the states in place."""
    state_RHKV.mul_(g_RH.exp()[..., None, None])
    known_RHV = torch.einsum("rhkv,rhk->rhv", state_RHKV, k_RHK)
    change_RHV = (v_RHV - known_RHV) * beta_RH.unsqueeze(-1)
    state_RHKV.add_(k_RHK.unsqueeze(-1) * change_RHV.unsqueeze(-2))
    return torch.einsum("rhkv,rhk->rhv", state_RHKV, q_RHK)


def scan(
    q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, state_HKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute consecutive tokens of one row; return outputs [T, H, V] and the state after them."""
    outputs = []
    for first in range(0, len(q_THK), CHUNK):
        end = first + CHUNK
        q_HCK, k_HCK, v_HCV, g_HC, beta_HC = (
            each[first:end].transpose(0, 1) for each in (q_THK, k_THK, v_THV, g_TH, beta_TH)
        )
        out_HCV, state_HKV = _chunk(q_HCK, k_HCK, v_HCV, g_HC, beta_HC, state_HKV)
        outputs.append(out_HCV.transpose(0, 1))
    return torch.cat(outputs), state_HKV


def _chunk(
    q_HCK: Tensor, k_HCK: Tensor, v_HCV: Tensor, g_HC: Tensor, beta_HC: Tensor, state_HKV: Tensor
) -> tuple[Tensor, Tensor]:
    sums_HC = g_HC.cumsum(-1)
    fading_HCC = (sums_HC.unsqueeze(-1) - sums_HC.unsqueeze(-2)).tril().exp().tril()
    faded_HC1, beta_HC1 = sums_HC.exp().unsqueeze(-1), beta_HC.unsqueeze(-1)
    known_HCV = (k_HCK * faded_HC1) @ state_HKV
    system_HCC = (k_HCK @ k_HCK.transpose(-1, -2)) * fading_HCC * beta_HC1
    change_HCV = torch.linalg.solve_triangular(
        system_HCC, (v_HCV - known_HCV) * beta_HC1, upper=False, unitriangular=True
    )
    out_HCV = (q_HCK * faded_HC1) @ state_HKV + (q_HCK @ k_HCK.transpose(-1, -2) * fading_HCC) @ change_HCV
    left_HC1 = (sums_HC[:, -1:] - sums_HC).exp().unsqueeze(-1)
    state_HKV = state_HKV * faded_HC1[:, -1:] + (k_HCK * left_HC1).transpose(-1, -2) @ change_HCV
    return out_HCV, state_HKV
