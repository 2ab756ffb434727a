"""The kernels' results in plain torch and float32, for their tests and for ``bench/kernels``."""

# T tokens, R rows, H query heads, J KV heads, G = H / J, K head dim, N blocks, B tokens per block, D model dim

import torch
import torch.nn.functional as F
from torch import Tensor


def paged_attention(
    q_THK: Tensor,
    k_NBJK: Tensor,
    v_NBJK: Tensor,
    block_tables_RP: Tensor,
    context_lens: list[int],
    query_starts: list[int],
    scale: float,
    window: int | None = None,
    in_chunks: bool = False,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attend with the last ``query_starts[r + 1] - query_starts[r]`` tokens of each row; float32 [T, H, K].

    ``sinks_H``: a score of each query head beside those of its context.
    """
    out_THK = torch.zeros(q_THK.shape, dtype=torch.float32, device=q_THK.device)
    for row, context in enumerate(context_lens):
        begin, end = query_starts[row], query_starts[row + 1]
        if begin == end or context == 0:
            continue
        slots = _slots(block_tables_RP[row], context, k_NBJK.shape[1])
        k_SJK, v_SJK = (cache.flatten(0, 1)[slots].float() for cache in (k_NBJK, v_NBJK))
        group = q_THK.shape[1] // k_SJK.shape[1]
        k_HSK, v_HSK = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k_SJK, v_SJK))
        scores_HQS = (q_THK[begin:end].float().transpose(0, 1) @ k_HSK.transpose(1, 2)) * scale
        keys_S = torch.arange(context, device=q_THK.device)
        queries_Q1 = torch.arange(context - (end - begin), context, device=q_THK.device)[:, None]
        visible_QS = keys_S <= queries_Q1
        if window is not None:
            visible_QS &= keys_S >= queries_Q1 // window * window if in_chunks else keys_S > queries_Q1 - window
        scores_HQS = scores_HQS.masked_fill(~visible_QS, -torch.inf)
        if sinks_H is not None:
            sinks_HQ1 = sinks_H.float().view(-1, 1, 1).expand(-1, end - begin, 1)
            scores_HQS = torch.cat((scores_HQS, sinks_HQ1), dim=-1)
        weights_HQS = scores_HQS.softmax(-1)[:, :, :context]
        out_THK[begin:end] = (weights_HQS @ v_HSK).transpose(0, 1)
    return out_THK


def _slots(table_P: Tensor, context: int, block_size: int) -> Tensor:
    places_S = torch.arange(context, device=table_P.device)
    return table_P.long()[places_S // block_size] * block_size + places_S % block_size


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalize rows in float32."""
    return F.rms_norm(x_TD.float(), (x_TD.shape[1],), weight_D.float(), eps)


def gated_activation(gate_up_TF2: Tensor, is_silu: bool) -> Tensor:
    """Return act(gate) * up in float32."""
    gate_TF, up_TF = gate_up_TF2.float().chunk(2, dim=-1)
    return (F.silu(gate_TF) if is_silu else F.gelu(gate_TF, approximate="tanh")) * up_TF


def rotate(x_TAK: Tensor, cos_sin_TK: Tensor) -> Tensor:
    """Rotate pairs (i, i + K / 2) of every head in float32; ``cos_sin_TK`` holds each token's cos, then sin."""
    cos_T1F, sin_T1F = cos_sin_TK.float()[:, None].chunk(2, dim=-1)
    low, high = x_TAK.float().chunk(2, dim=-1)
    return torch.cat([low * cos_T1F - high * sin_T1F, high * cos_T1F + low * sin_T1F], dim=-1)
