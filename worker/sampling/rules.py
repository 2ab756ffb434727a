"""Change logits before a token is chosen: bias, penalties, banned ids. In place, on any slice of the vocabulary."""

# V tokens of a vocabulary slice, L tokens of a request so far

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import LogitBias, RowSampling


def apply_rules(logits_V: Tensor, first_id: int, sampling: RowSampling, tokens_L: Tensor, prompt_len: int) -> None:
    """Apply a row's rules to its logits for the ids from ``first_id`` on.

    ``tokens_L`` are all tokens before the one to choose, so its length is the position of that one.
    """
    if sampling.logit_bias is not None:
        _add_bias(logits_V, first_id, sampling.logit_bias)
    if sampling.has_penalties:
        _penalize(logits_V, first_id, sampling, tokens_L, prompt_len)
    if sampling.banned_ids and len(tokens_L) < sampling.banned_until:
        banned = [id_ - first_id for id_ in sampling.banned_ids if first_id <= id_ < first_id + len(logits_V)]
        logits_V[torch.tensor(banned, dtype=torch.int64, device=logits_V.device)] = -torch.inf


def _add_bias(logits_V: Tensor, first_id: int, bias: LogitBias) -> None:
    """Add to all biased logits of this slice at once; an id that is named twice gets the sum."""
    local_N = torch.frombuffer(bytearray(bias.token_ids), dtype=torch.int32).long() - first_id
    values_N = torch.frombuffer(bytearray(bias.values), dtype=torch.float32)
    here_N = (local_N >= 0) & (local_N < len(logits_V))
    logits_V.index_add_(0, local_N[here_N].to(logits_V.device), values_N[here_N].to(logits_V.device))


def _penalize(logits_V: Tensor, first_id: int, sampling: RowSampling, tokens_L: Tensor, prompt_len: int) -> None:
    if sampling.repetition_penalty != 1.0:
        seen_V = _counts(tokens_L, first_id, len(logits_V)) > 0
        factor = sampling.repetition_penalty
        penalized_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
        logits_V.copy_(torch.where(seen_V, penalized_V, logits_V))
    if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
        counts_V = _counts(tokens_L[prompt_len:], first_id, len(logits_V))
        logits_V -= sampling.frequency_penalty * counts_V + sampling.presence_penalty * (counts_V > 0)


def _counts(tokens_L: Tensor, first_id: int, count: int) -> Tensor:
    """Count each id of the slice, fp32 [V]. Ids of other slices are counted in one more column, which is cut off."""
    local_L = tokens_L.long() - first_id
    local_L = torch.where((local_L >= 0) & (local_L < count), local_L, count)
    counts = torch.zeros(count + 1, dtype=torch.float32, device=tokens_L.device)
    return counts.index_add_(0, local_L, torch.ones_like(local_L, dtype=torch.float32))[:count]
