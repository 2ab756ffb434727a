"""States of linear attention: instead of keys and values of all tokens, each row has a matrix per head, and a tail.

A row's state stands for all tokens that were computed so far. A row whose first token is computed has none yet:
whatever is stored then does not count, so nothing need be cleared when a row changes its owner.
"""

# N rows, H value heads of this rank, K key dim, V value dim, W inputs of the convolution before the newest one,
# C channels of this rank: queries, keys and values

from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.model.attention_facts import LinearFacts


@dataclass(frozen=True, slots=True)
class LayerStates:
    """The states of all rows in one layer."""

    state_NHKV: Tensor
    """float32."""
    tail_NWC: Tensor
    """The last inputs of the convolution, oldest first, in the type of the activations."""


class StatePool:
    """The states of several layers, those of one row side by side, so that they are copied at once."""

    def __init__(
        self,
        linear: LinearFacts,
        num_layers: int,
        tp_size: int,
        num_states: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        state = linear.value_heads // tp_size, linear.key_dim, linear.value_dim
        tail = linear.conv_width - 1, linear.channels(tp_size)
        self._states = torch.empty((num_states, num_layers, *state), dtype=torch.float32, device=device)
        self._tails = torch.empty((num_states, num_layers, *tail), dtype=dtype, device=device)

    def layer(self, place: int) -> LayerStates:
        """Return the states of one layer."""
        return LayerStates(self._states[:, place], self._tails[:, place])

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy the states of some rows to others. No source is a target."""
        for source, target in zip(sources, targets, strict=True):
            self._states[target].copy_(self._states[source])
            self._tails[target].copy_(self._tails[source])
