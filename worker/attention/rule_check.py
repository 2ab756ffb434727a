"""Try the kernels of linear layers on a small random case before a worker relies on them."""

# T tokens, R rows, H value heads, G key heads, K key dim, V value dim

from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.worker.kernels.linear import rule
from mgpu.worker.kernels.linear.compute import compute
from mgpu.worker.kernels.linear.inputs import RuleInputs, RuleWeights, StateRows, StepStates, has_kernels_for, owners_of
from mgpu.worker.kernels.use import aligned

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NEW_TOKENS, _CONTEXTS = (1, 70, 0, 3, 130), (9, 70, 0, 20, 130)
"""Tokens of each row in the step, and after it: one that decodes, a new prompt, padding, the end of a prompt, and a
prompt of three chunks."""


@cache
def rule_problem(device: torch.device, linear: LinearFacts, dtype: torch.dtype) -> str | None:
    """Return what is wrong with the kernels for heads of these sizes; None if they agree with plain torch."""
    if not has_kernels_for(linear, dtype):
        least, sizes = 16 if dtype == torch.float32 else 64, f"{linear.key_dim} x {linear.value_dim}"
        return f"kernels need heads whose sizes are powers of two from {least} to 128, not {sizes}"
    try:
        error = _error(device, linear, dtype)
    except Exception as failure:  # a compiler's or driver's failure may be of any type; plain torch still serves
        return f"the kernels failed: {type(failure).__name__}: {failure}"
    if error <= _TOLERANCE[dtype]:
        return None
    return f"the kernels' result is off by {error:.1e} of its norm"


def launch_rule(device: torch.device, linear: LinearFacts, dtype: torch.dtype) -> None:
    """Launch the kernels of the check and ignore their results, so that they are compiled."""
    if has_kernels_for(linear, dtype):
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
    rows, tokens = len(_NEW_TOKENS), sum(_NEW_TOKENS)
    inputs_TC, rates, gates = (draw(tokens, width).to(dtype) for width in (channels, 2 * heads, heads * value_dim))
    inputs = RuleInputs(inputs_TC, rates, gates.view(-1, heads, value_dim))
    state, tail = draw(rows, heads, key_dim, value_dim), draw(rows, linear.conv_width - 1, channels).to(dtype)
    ends = [*accumulate(_NEW_TOKENS)]
    expected = [
        _plain(inputs, weights, state, tail, row, slice(end - count, end), count == context)
        for row, (end, count, context) in enumerate(zip(ends, _NEW_TOKENS, _CONTEXTS, strict=True))
    ]
    numbers_R = torch.arange(rows, device=device)
    starts = torch.tensor(ends, dtype=torch.int32, device=device)
    lens = torch.tensor(_CONTEXTS, dtype=torch.int32, device=device)
    decode = StateRows(numbers_R[:1], lens[:1])
    prompts = StateRows(aligned(numbers_R[1:]), aligned(lens[1:]), starts, owners_of(starts, tokens))
    out = compute(inputs, state, tail, weights, StepStates(decode, prompts))
    errors = []
    for row, (end, count) in enumerate(zip(ends, _NEW_TOKENS, strict=True)):
        if count:
            found, wanted = (out[end - count : end], state[row]), expected[row]
            errors += [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    return max(error if error == error else torch.inf for error in errors)


def _plain(
    inputs: RuleInputs,
    weights: RuleWeights,
    state_NHKV: Tensor,
    tail_NWC: Tensor,
    row: int,
    new: slice,
    is_new: bool,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of one row's tokens, and its state after them, by plain torch in float32."""
    if not inputs.inputs_TC[new].numel():
        return inputs.gates_THV[new].float(), state_NHKV[row]
    kept = 0.0 if is_new else 1.0
    heads, keys, key_dim = weights.value_heads, weights.key_heads, weights.key_dim
    window = torch.cat((tail_NWC[row] * kept, inputs.inputs_TC[new])).float()
    weight = weights.conv_CW.float().unsqueeze(1)
    mixed = F.silu(F.conv1d(window.T.unsqueeze(0), weight, groups=len(weight))[0]).T
    q, k, v = torch.split(mixed, [keys * key_dim, keys * key_dim, heads * weights.value_dim], dim=1)
    q, k = rule.queries_and_keys(q.reshape(-1, keys, key_dim), k.reshape(-1, keys, key_dim), heads)
    beta, fading = inputs.rates_T2H[new].float().chunk(2, dim=-1)
    g = -weights.log_rate_H.exp() * F.softplus(fading + weights.bias_H)
    out, state = rule.scan(q, k, v.reshape(-1, heads, weights.value_dim), g, beta.sigmoid(), state_NHKV[row] * kept)
    normed = F.rms_norm(out, (weights.value_dim,), weights.norm_V.float(), weights.eps)
    return normed * F.silu(inputs.gates_THV[new].float()), state
