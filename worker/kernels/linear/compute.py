"""Compute one linear layer of a step by kernels, from the product of its projections to its gated outputs."""

# T tokens, N rows of the worker, H value heads, K key dim, V value dim, C channels

import torch
from torch import Tensor

from mgpu.worker.kernels.linear.convolve import convolve_decoding, convolve_prompts
from mgpu.worker.kernels.linear.inputs import RuleInputs, RuleWeights, StepStates
from mgpu.worker.kernels.linear.scan import rule_scan
from mgpu.worker.kernels.linear.step import rule_step


def compute(
    inputs: RuleInputs,
    state_NHKV: Tensor,
    tail_NWC: Tensor,
    weights: RuleWeights,
    step: StepStates,
    *,
    is_convolved: bool = False,
) -> Tensor:
    """Return the outputs [T, H, V] of a step's tokens by kernels, and bring the states of its rows up to date.

    ``is_convolved``: the inputs of rows that decode are the outputs of the convolution, and no row has a prompt.
    """
    # Tokens that only pad a step with prompts get zeros: what is undefined could be anything to the layers behind.
    make = torch.empty if step.prompts is None else torch.zeros
    out_THV = make(inputs.gates_THV.shape, dtype=weights.conv_CW.dtype, device=weights.conv_CW.device)
    if is_convolved:
        assert step.decode is not None, "a row decodes"
        rule_step(inputs.inputs_TC, inputs, state_NHKV, weights, step.decode, out_THV)
        return out_THV
    mixed_TC = torch.empty_like(inputs.inputs_TC, memory_format=torch.contiguous_format)
    if step.decode is not None:
        convolve_decoding(inputs.inputs_TC, tail_NWC, weights.conv_CW, step.decode, mixed_TC)
        rule_step(mixed_TC, inputs, state_NHKV, weights, step.decode, out_THV)
    if step.prompts is not None:
        convolve_prompts(inputs.inputs_TC, tail_NWC, weights.conv_CW, step.prompts, mixed_TC)
        rule_scan(mixed_TC, inputs, state_NHKV, weights, step.prompts, out_THV)
    return out_THV
