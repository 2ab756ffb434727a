"""The rows and results of float8 products (W8A8), in plain torch, so that layers pass them on without Triton.

A row of activations has one scale, chosen from that row alone, so that no result depends on the rest of the batch. Its
largest value becomes 448. Scales that are powers of two would make rescaling exact, but cost more quality than they
save: most results are rescaled in float32 by the kernel that reads them.
"""

# T tokens, K input channels, N output channels, B blocks of K, P parts of a word, W words

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.quantization.packing import WORDS

LEAST_ROWS = 9
"""Rows from which a float8 product is faster than a weight-only one; fewer are bound by reading the weight."""
BLOCK = 4 * WORDS
"""Channels of a block of words."""
ROWS_AT_ONCE = 16
"""The scales of a block of 128 channels fill whole units of 16 bytes and more, as the library wants them."""
LARGEST = 448.0
SMALLEST = 1e-30
"""Least value that a row's largest counts as, so that its scale has an inverse."""


@dataclass(frozen=True, slots=True)
class Float8Rows:
    """Quantized activations: ``values`` * ``scale_T`` are the rows, with channels in the order of packed words.

    ``values``: float8_e4m3fn [T, K padded to blocks of 128], zeros where padded. ``scale_T``: float32.
    """

    values: Tensor
    scale_T: Tensor


@dataclass(frozen=True, slots=True)
class Float8Blocks:
    """Quantized activations whose blocks of 128 channels have scales of their own, channels in the order of words.

    ``values``: float8_e4m3fn [T, K padded to blocks], zeros where padded. ``scale_TB``: float32, where the scales of a
    block of all rows are neighbours in memory, as the library wants them. T is padded to a multiple of `ROWS_AT_ONCE`
    by rows of any values.
    """

    values: Tensor
    scale_TB: Tensor


@dataclass(frozen=True, slots=True)
class UnscaledProduct:
    """A float8 product [T, N]: its rows still have to be multiplied by ``scale_T`` (float32).

    The kernel that reads the product multiplies in passing, which costs nothing.
    """

    values: Tensor
    scale_T: Tensor

    def scaled(self) -> Tensor:
        """Multiply in place and return the values. Call it only once."""
        return self.values.mul_(self.scale_T[:, None])


def quantize_rows(x_TK: Tensor) -> Float8Rows:
    """Return the rows quantized, by the same arithmetic as the kernels."""
    values_TK, scale_T = _quantized(x_TK)
    blocks_TBPW = F.pad(values_TK, (0, -x_TK.shape[1] % BLOCK)).view(len(x_TK), -1, 4, WORDS)
    return Float8Rows(blocks_TBPW.transpose(2, 3).flatten(1).to(torch.float8_e4m3fn), scale_T)


def round_rows(x_TK: Tensor) -> Tensor:
    """Return the rows as rounded by quantization, in float32 and in their own order."""
    values_TK, scale_T = _quantized(x_TK)
    return values_TK.to(torch.float8_e4m3fn).float() * scale_T[:, None]


def quantize_blocks(x_TK: Tensor) -> Float8Blocks:
    """Return the rows quantized block by block, by the same arithmetic as the kernel."""
    padded_TK = F.pad(x_TK, (0, -x_TK.shape[1] % BLOCK, 0, -len(x_TK) % ROWS_AT_ONCE))
    values, scales = _quantized(padded_TK.view(-1, BLOCK))
    values_TBPW = values.view(len(padded_TK), -1, 4, WORDS)
    octets_TK = values_TBPW.transpose(2, 3).flatten(1).to(torch.float8_e4m3fn)
    return Float8Blocks(octets_TK, scales.view(len(padded_TK), -1).t().contiguous().t())


def round_blocks(x_TK: Tensor) -> Tensor:
    """Return the rows as rounded by `quantize_blocks`, in float32 and in their own order."""
    padded_TK = F.pad(x_TK, (0, -x_TK.shape[1] % BLOCK))
    return round_rows(padded_TK.view(-1, BLOCK)).view(padded_TK.shape)[:, : x_TK.shape[1]]


def _quantized(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 values, the largest of each row at 448, before rounding; and the scales."""
    most_T = x_TK.float().abs().amax(1).clamp_(min=SMALLEST)
    # Divide by a tensor: for a plain number torch multiplies by a rounded inverse, and the kernels do not.
    largest_T = torch.full_like(most_T, LARGEST)
    return x_TK.float() * (largest_T / most_T)[:, None], most_T / largest_T
