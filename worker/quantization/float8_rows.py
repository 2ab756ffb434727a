"""Rows on their way into and out of float8 products (W8A8): plain torch, so that layers pass them on without Triton.

A row of activations has one scale, chosen from that row alone, so that no result depends on what else is in the batch.
Its largest value lies at 448. Powers of two would make rescaling exact, but cost more quality than they save: most
results are rescaled in float32 by the kernel that reads them.
"""

# T tokens, K input channels, N output channels, B blocks, P parts of a word, W words

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.quantization.packing import WORDS

LEAST_ROWS = 9
"""Rows from which a float8 product is faster than a weight-only one; fewer are bound by reading the weight."""
BLOCK = 4 * WORDS
"""Channels of a block of words."""
LARGEST = 448.0
SMALLEST = 1e-30
"""What a row's largest value counts as at least, so that its scale has an inverse."""


@dataclass(frozen=True, slots=True)
class Float8Rows:
    """Activations, quantized: ``values`` * ``scale_T`` are the rows, their channels in the order of packed words.

    ``values``: float8_e4m3fn [T, K padded to blocks of 128], zeros where padded. ``scale_T``: float32.
    """

    values: Tensor
    scale_T: Tensor


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """A product whose rows are still to be multiplied by ``scale_T`` (float32): whoever reads them does it for free."""

    values: Tensor
    scale_T: Tensor

    def plain(self) -> Tensor:
        """Multiply in place, once: the values are the result then."""
        return self.values.mul_(self.scale_T[:, None])


Activations = Tensor | Float8Rows
"""What a linear layer takes."""
Product = Tensor | ScaledRows
"""What a linear layer gives."""


def plain(product: Product) -> Tensor:
    """Give a product as an ordinary tensor."""
    return product.plain() if isinstance(product, ScaledRows) else product


def values_and_scale(product: Product) -> tuple[Tensor, Tensor | None]:
    """Give a product's values, and what its rows are still to be multiplied by."""
    return (product.values, product.scale_T) if isinstance(product, ScaledRows) else (product, None)


def quantize_rows(x_TK: Tensor) -> Float8Rows:
    """Quantize: the reference of the kernels, which do the same arithmetic."""
    values_TK, scale_T = _quantized(x_TK)
    blocks_TBPW = F.pad(values_TK, (0, -x_TK.shape[1] % BLOCK)).view(len(x_TK), -1, 4, WORDS)
    return Float8Rows(blocks_TBPW.transpose(2, 3).flatten(1).to(torch.float8_e4m3fn), scale_T)


def round_rows(x_TK: Tensor) -> Tensor:
    """Give rows as a float8 product sees them, float32 and in their own order."""
    values_TK, scale_T = _quantized(x_TK)
    return values_TK.to(torch.float8_e4m3fn).float() * scale_T[:, None]


def _quantized(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Give float32 values whose largest in each row is 448, not yet rounded, and the scales."""
    most_T = x_TK.float().abs().amax(1).clamp_(min=SMALLEST)
    # Where one of two is a number, torch multiplies by a rounded inverse: not what the kernels compute.
    largest_T = torch.full_like(most_T, LARGEST)
    return x_TK.float() * (largest_T / most_T)[:, None], most_T / largest_T
