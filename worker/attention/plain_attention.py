"""Attention over gathered keys and values in torch: its fused function, or by hand where scores need more than that."""

# Q queries, S keys, K head dim

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.attention.interface import AttentionSpec


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, spec: AttentionSpec, sinks: Tensor | None
) -> Tensor:
    """Return the output [..., Q, K] of queries [..., Q, K] over keys and values [..., S, K].

    ``mask`` is added to the scores, or says which of them count. ``sinks`` is broadcast to [..., Q, 1]: a score beside
    those of the keys, whose share of the probabilities goes nowhere.
    """
    if not spec.softcap and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=spec.scale)
    scores = (q @ k.transpose(-1, -2)).float() * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
    probabilities = scores.softmax(-1)[..., : k.shape[-2]]
    return probabilities.to(v.dtype) @ v
