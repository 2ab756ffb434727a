"""Talk to the other ranks: partial sums inside a stage, activations between stages, sampled tokens back to the first.

The only file that names torch.distributed. Every wait has the deadline of the spec and raises `PeerLost`.
"""

from typing import Protocol

from torch import Tensor


class TensorParallelGroup(Protocol):
    """The ranks of one stage, which hold slices of the same layers. Every rank must make the same calls in order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Give the sum over the group, the same bits on every rank; ``x`` may be overwritten."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the ranks' tensors of one shape along the last dimension."""
        ...


class SingleRank:
    """A group of one: nothing to add, nobody to ask."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x
