"""What kernels of linear attention take: sizes, small weights, and the rows of a step. This module needs no Triton."""

# T tokens, R rows, H value heads of this rank, G key heads of this rank, C channels of this rank

from typing import NamedTuple

import torch
from torch import Tensor

from mgpu.protocol.model.attention_facts import LinearFacts


class RuleWeights(NamedTuple):
    """The small weights of one layer on one rank, and its sizes."""

    conv_CW: Tensor
    norm_V: Tensor
    bias_H: Tensor
    log_rate_H: Tensor
    eps: float
    key_heads: int
    key_dim: int
    value_dim: int

    @property
    def value_heads(self) -> int:
        return len(self.bias_H)


class RuleInputs(NamedTuple):
    """The product of a layer's projections, in parts. Each has its own row stride and contiguous columns."""

    inputs_TC: Tensor
    """Inputs of the convolution: queries, keys, values."""
    rates_T2H: Tensor
    """What becomes beta, then what becomes g, of each value head."""
    gates_THV: Tensor


class StateRows(NamedTuple):
    """Rows that one kernel serves, on the device."""

    rows_R: Tensor
    """Which row of the worker each one is."""
    lens_R: Tensor
    """int32: tokens of each after this step; 0: the row is left out."""
    starts: Tensor | None = None
    """int32 [R + 1]: the rows' tokens; None: row r has token r."""
    owners_T: Tensor | None = None
    """int32: which of the R rows each token of the step is of, -1: none. With ``starts``."""


class StepStates(NamedTuple):
    """The rows of a step: those that decode, whose tokens come first, and those with prompts."""

    decode: StateRows | None
    prompts: StateRows | None


def has_kernels_for(linear: LinearFacts, dtype: torch.dtype) -> bool:
    """Return True if a head's state fits into the registers of a program, and its sizes into products of tiles.

    Products of prompts in two bytes were wrong on an H200 where keys had 16 components and values 32.
    """
    sizes, least = (linear.key_dim, linear.value_dim), 16 if dtype == torch.float32 else 64
    return all(size >= least and size & (size - 1) == 0 for size in sizes) and sizes[0] * sizes[1] <= 1 << 14


def owners_of(starts: Tensor, num_tokens: int) -> Tensor:
    """Return which row each of the step's tokens is of, -1 for tokens outside of ``starts``."""
    tokens_T = torch.arange(num_tokens, dtype=starts.dtype, device=starts.device)
    owners_T = torch.searchsorted(starts[1:].contiguous(), tokens_T, right=True, out_int32=True)
    is_owned_T = (tokens_T >= starts[0]) & (owners_T < len(starts) - 1)
    return torch.where(is_owned_T, owners_T, -1)
