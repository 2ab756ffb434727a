"""Exclude unlikely tokens: top_k, top_p and min_p become one threshold per row.

A threshold keeps every token that is as likely as the last one kept, so ties never depend on the order of a sort.
"""

# F rows that are filtered, V tokens of the whole vocabulary, C candidates: the likeliest tokens in order

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import RowSampling

_FEW = 256
"""On the CPU, sorting all by numpy is quicker than finding more than so many."""


def thresholds(z_FV: Tensor, sampling: Sequence[RowSampling]) -> Tensor:
    """Return the least scaled logit (``logits / temperature``) that each row may choose, fp32 [F].

    Rules in order: the ``top_k`` likeliest; of those the fewest whose probability reaches ``top_p``; of those the
    tokens at least ``min_p`` times as likely as the likeliest.
    """
    top_k = _column(z_FV, [_top_k(row, z_FV.shape[1]) for row in sampling], torch.int64)
    top_p = _column(z_FV, [row.top_p for row in sampling])
    min_p = _column(z_FV, [row.min_p for row in sampling])
    least_F = z_FV.amax(-1) + min_p.log()  # log(0) = -inf: no limit
    if any(row.top_k > 0 or row.top_p < 1.0 for row in sampling):
        depth = _depth(z_FV, sampling)
        # On a CPU one row after another takes a third of the time: its tables fit into memory that is at hand.
        step = 1 if z_FV.device.type == "cpu" and depth > _FEW else len(z_FV)
        parts = zip(torch.split(z_FV, step), torch.split(top_k, step), torch.split(top_p, step), strict=True)
        least_F = torch.maximum(least_F, torch.cat([_nucleus(z, k, p, depth) for z, k, p in parts]))
    return least_F


def _column(like: Tensor, values: list[int] | list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)


def _top_k(row: RowSampling, vocab_size: int) -> int:
    """Return a row's ``top_k``, 0 if it keeps all tokens."""
    return row.top_k if row.top_k < vocab_size else 0


def _depth(z_FV: Tensor, sampling: Sequence[RowSampling]) -> int:
    """Return how many of the likeliest tokens must be known: all, for a ``top_p`` that has no ``top_k`` beside it."""
    vocab_size = z_FV.shape[1]
    if any(row.top_p < 1.0 and not _top_k(row, vocab_size) for row in sampling):
        return vocab_size
    return max(1, *(_top_k(row, vocab_size) for row in sampling))


def _likeliest(z_FV: Tensor, depth: int) -> Tensor:
    """Return the ``depth`` largest values of each row in order, fp32 [F, C]."""
    if z_FV.device.type == "cpu" and depth > _FEW:
        ordered_FV = np.sort(z_FV.numpy(), axis=1)  # a tenth of the time of torch.topk and torch.sort
        return torch.from_numpy(ordered_FV[:, ::-1][:, :depth].copy())
    return torch.topk(z_FV, depth).values


def _nucleus(z_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor, depth: int) -> Tensor:
    """Return the value of the last token that top_k and top_p keep, by the ``depth`` likeliest."""
    values_FC = _likeliest(z_FV, depth)
    kept_FC = torch.arange(depth, device=z_FV.device) < torch.where(top_k_F > 0, top_k_F, depth)[:, None]
    values_FC = values_FC.masked_fill(~kept_FC, -torch.inf)
    total_F = torch.where(top_k_F > 0, values_FC.logsumexp(-1), z_FV.logsumexp(-1))
    reached_FC = (values_FC - total_F[:, None]).double().exp_().cumsum_(-1) >= top_p_F[:, None].double()
    open_F = ~reached_FC.any(-1)
    last_F = torch.where(open_F | (top_p_F >= 1.0), kept_FC.sum(-1) - 1, reached_FC.int().argmax(-1))
    threshold_F = values_FC.gather(-1, last_F[:, None])[:, 0]
    limited_F = (top_k_F > 0) | (top_p_F < 1.0)
    return torch.where(limited_F, threshold_F, -torch.inf)
