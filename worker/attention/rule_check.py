"""Try the kernels of linear layers on a small random case before a worker relies on them."""

# T tokens, R rows, H value heads, G key heads, K key dim, V value dim

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.facts import LinearFacts
from mgpu.worker.kernels.linear import rule
from mgpu.worker.kernels.linear.compute import compute
from mgpu.worker.kernels.linear.inputs import RuleInputs, RuleWeights, StateRows, StepStates, has_kernels_for, owners_of

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PROMPT = 70
"""Tokens: more than one chunk."""


@cache
def rule_problem(device: torch.device, linear: LinearFacts, dtype: torch.dtype) -> str | None:
    """Return what is wrong with the kernels for heads of these sizes; None if they agree with plain torch."""
    if not has_kernels_for(linear):
        return f"kernels need heads whose sizes are powers of two from 16 on, not {linear.key_dim} x {linear.value_dim}"
    try:
        error = _error(device, linear, dtype)
    except Exception as failure:  # a compiler's or driver's failure may be of any type; plain torch still serves
        return f"the kernels failed: {type(failure).__name__}: {failure}"
    if error <= _TOLERANCE[dtype]:
        return None
    return f"the kernels' result is off by {error:.1e} of its norm"


def launch_rule(device: torch.device, linear: LinearFacts, dtype: torch.dtype) -> None:
    """Launch the kernels of the check and ignore their results, so that they are compiled."""
    if has_kernels_for(linear):
        _error(device, linear, dtype)


@torch.inference_mode()
def _error(device: torch.device, linear: LinearFacts, dtype: torch.dtype) -> float:
    """Return the largest distance to plain torch of outputs and states, relative to their norms."""
    keys, shared = 2, linear.value_heads // linear.key_heads
    heads, key_dim, value_dim = keys * shared, linear.key_dim, linear.value_dim
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    channels = 2 * keys * key_dim + heads * value_dim
    weights = RuleWeights(
        draw(channels, linear.conv_width).mul_(0.5).to(dtype), torch.ones(value_dim, dtype=dtype, device=device),
        draw(heads), draw(heads), 1e-6, keys, key_dim, value_dim,
    )  # fmt: skip
    inputs_TC, rates, gates = (draw(1 + _PROMPT, width).to(dtype) for width in (channels, 2 * heads, heads * value_dim))
    inputs = RuleInputs(inputs_TC, rates, gates.view(-1, heads, value_dim))
    state, tail = draw(2, heads, key_dim, value_dim), draw(2, linear.conv_width - 1, channels).to(dtype)
    expected = [_plain(inputs, weights, state, tail, row, new) for row, new in ((1, slice(0, 1)), (0, slice(1, None)))]
    out = torch.empty((1 + _PROMPT, heads, value_dim), dtype=dtype, device=device)
    starts = torch.tensor([1, 1 + _PROMPT], dtype=torch.int32, device=device)
    lens = torch.tensor([9, 9 + _PROMPT], dtype=torch.int32, device=device)
    step = StepStates(
        StateRows(torch.tensor([1], device=device), lens[:1]),
        StateRows(torch.tensor([0], device=device), lens[1:], starts, owners_of(starts, 1 + _PROMPT)),
    )
    compute(inputs, state, tail, weights, step, out)
    found = out, state.flip(0)
    wanted = torch.cat([each for each, _ in expected]), torch.stack([each for _, each in expected])
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(error if error == error else torch.inf for error in errors)


def _plain(
    inputs: RuleInputs, weights: RuleWeights, state_NHKV: Tensor, tail_NWC: Tensor, row: int, new: slice
) -> tuple[Tensor, Tensor]:
    """Return the outputs of one row's tokens, and its state after them, by plain torch in float32."""
    heads, keys, key_dim = weights.value_heads, weights.key_heads, weights.key_dim
    window = torch.cat((tail_NWC[row], inputs.inputs_TC[new])).float()
    weight = weights.conv_CW.float().unsqueeze(1)
    mixed = F.silu(F.conv1d(window.T.unsqueeze(0), weight, groups=len(weight))[0]).T
    q, k, v = torch.split(mixed, [keys * key_dim, keys * key_dim, heads * weights.value_dim], dim=1)
    q, k = rule.queries_and_keys(q.reshape(-1, keys, key_dim), k.reshape(-1, keys, key_dim), heads)
    beta, fading = inputs.rates_T2H[new].float().chunk(2, dim=-1)
    g = -weights.log_rate_H.exp() * F.softplus(fading + weights.bias_H)
    out, state = rule.scan(q, k, v.reshape(-1, heads, weights.value_dim), g, beta.sigmoid(), state_NHKV[row].clone())
    normed = F.rms_norm(out, (weights.value_dim,), weights.norm_V.float(), weights.eps)
    return normed * F.silu(inputs.gates_THV[new].float()), state
