"""Exclude unlikely tokens: top_k, top_p and min_p become one threshold per row.

A threshold keeps every token that is as likely as the last one kept, so ties never depend on the order of a sort.
"""

# F rows that are filtered, V tokens of the whole vocabulary, C candidates: the likeliest tokens in order

from collections.abc import Sequence

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import RowSampling

_CANDIDATES = 1024
"""Candidates to try first: sorting a whole vocabulary takes several times as long as finding so many."""


def thresholds(z_FV: Tensor, sampling: Sequence[RowSampling]) -> Tensor:
    """Return the least scaled logit (``logits / temperature``) that each row may choose, fp32 [F].

    Rules in order: the ``top_k`` likeliest; of those the fewest whose probability reaches ``top_p``; of those the
    tokens at least ``min_p`` times as likely as the likeliest.
    """
    top_k = _column(z_FV, [min(row.top_k, z_FV.shape[1]) for row in sampling], torch.int64)
    top_p = _column(z_FV, [row.top_p for row in sampling])
    min_p = _column(z_FV, [row.min_p for row in sampling])
    least_F = z_FV.amax(-1) + min_p.log()  # log(0) = -inf: no limit
    if any(row.top_k > 0 or row.top_p < 1.0 for row in sampling):
        least_F = torch.maximum(least_F, _nucleus(z_FV, top_k, top_p, _depth(z_FV, sampling)))
    return least_F


def _column(like: Tensor, values: list[int] | list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)


def _depth(z_FV: Tensor, sampling: Sequence[RowSampling]) -> int:
    depth = max(row.top_k for row in sampling)
    if any(row.top_p < 1.0 and row.top_k == 0 for row in sampling):
        # On a GPU, sorting all is cheaper than waiting to hear whether a part was enough.
        depth = max(depth, _CANDIDATES if z_FV.device.type == "cpu" else z_FV.shape[1])
    return min(depth, z_FV.shape[1])


def _nucleus(z_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor, depth: int) -> Tensor:
    """Return the value of the last token that top_k and top_p keep; tries ``depth`` candidates first."""
    values_FC = torch.topk(z_FV, depth).values
    kept_FC = torch.arange(depth, device=z_FV.device) < torch.where(top_k_F > 0, top_k_F, depth)[:, None]
    values_FC = values_FC.masked_fill(~kept_FC, -torch.inf)
    total_F = torch.where(top_k_F > 0, values_FC.logsumexp(-1), z_FV.logsumexp(-1))
    reached_FC = (values_FC - total_F[:, None]).double().exp().cumsum(-1) >= top_p_F[:, None].double()
    open_F = ~reached_FC.any(-1)
    if depth < z_FV.shape[1] and z_FV.device.type == "cpu" and bool((open_F & (top_k_F == 0) & (top_p_F < 1.0)).any()):
        return _nucleus(z_FV, top_k_F, top_p_F, min(depth * 8, z_FV.shape[1]))
    last_F = torch.where(open_F | (top_p_F >= 1.0), kept_FC.sum(-1) - 1, reached_FC.int().argmax(-1))
    threshold_F = values_FC.gather(-1, last_F[:, None])[:, 0]
    limited_F = (top_k_F > 0) | (top_p_F < 1.0)
    return torch.where(limited_F, threshold_F, -torch.inf)
