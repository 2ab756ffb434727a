"""The result of a row-parallel product: the sum over the ranks, or a rank's part that the next norm adds up.

If the ranks reach each other's memory, one kernel adds up, adds to the residual stream and normalizes.
"""

# T tokens, D model dim

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mgpu.worker.layers.activations import Activations, Product, scaled
from mgpu.worker.quantization.float8_rows import UnscaledProduct
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.ranks.peer_group import PeerGroup, peers_of


class Sum(Protocol):
    """A sum that the next norm may compute: over ranks (`PartialSum`), or over experts on one rank."""

    def total(self) -> Tensor: ...

    def add_and_norm(self, residual_TD: Tensor, weight_D: Tensor, eps: float, in_float8: bool) -> Activations:
        """Add the sum to ``residual`` in place and return the normalized stream, which may be quantized."""
        ...


@dataclass(frozen=True, slots=True)
class PartialSum:
    """This rank's part of a sum over ``group``, to which the bias is added once."""

    part_TD: Tensor
    bias_D: Tensor | None
    group: PeerGroup

    def total(self) -> Tensor:
        """Add up; every rank must do so."""
        y_TD = self.group.all_reduce(self.part_TD)
        return y_TD if self.bias_D is None else y_TD.add_(self.bias_D)

    def add_and_norm(self, residual_TD: Tensor, weight_D: Tensor, eps: float, in_float8: bool) -> Activations:
        """Add the sum to ``residual`` in place and return the normalized stream, quantized if ``in_float8``."""
        if in_float8 and self.group.in_float8:
            return self.group.add_and_norm_float8(residual_TD, self.part_TD, self.bias_D, weight_D, eps)
        return self.group.add_and_norm(residual_TD, self.part_TD, self.bias_D, weight_D, eps)


@dataclass(frozen=True, slots=True)
class SentSum:
    """The sum over ``group`` of products of one row that the ranks have sent already; the bias is added once."""

    bias_D: Tensor | None
    group: PeerGroup
    device: torch.device

    def total(self) -> Tensor:
        """Add up; every rank must do so."""
        return self.group.add_sent(self.bias_D, self.device)

    def add_and_norm(self, residual_TD: Tensor, weight_D: Tensor, eps: float, in_float8: bool) -> Activations:
        """Add the sum to ``residual`` in place and return the normalized stream. One row is never quantized."""
        return self.group.add_sent_and_norm(residual_TD, self.bias_D, weight_D, eps)


Delta = Product | Sum
"""What a layer adds to the residual stream: the whole product, or a sum that is not computed yet."""


def sum_of_parts(part_TD: Tensor, bias_D: Tensor | None, group: TensorParallelGroup) -> Delta:
    """Return the sum of the ranks' parts, or this rank's part of it if the next norm adds them up.

    The bias is added once, after the sum.
    """
    if group.size > 1:
        peers = peers_of(group)
        if peers is not None and peers.takes(part_TD):
            return PartialSum(part_TD, bias_D, peers)
        part_TD = group.all_reduce(part_TD)
    return part_TD if bias_D is None else part_TD.add_(bias_D)


def sent_product(x_TI: Activations, w_OI: Tensor, bias_O: Tensor | None, group: TensorParallelGroup) -> Delta | None:
    """Multiply this rank's part of one row and send it to all ranks while it is computed; None where that cannot be."""
    peers = peers_of(group)
    if peers is None or not isinstance(x_TI, Tensor) or not peers.takes_product(x_TI, w_OI):
        return None
    peers.send_product(x_TI, w_OI)
    return SentSum(bias_O, peers, x_TI.device)


def summed(delta: Delta) -> Product:
    """Return the whole product. For a `PartialSum` the ranks add up their parts now, so every rank must call this."""
    return delta if isinstance(delta, (Tensor, UnscaledProduct)) else delta.total()


def summed_tensor(delta: Delta) -> Tensor:
    """Return the whole product as a Tensor: a float8 product is multiplied by its scales."""
    return scaled(summed(delta))
