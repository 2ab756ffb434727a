"""The rows of products of int8 weights in integers, in plain torch: the reference of their kernel.

A row becomes integers of 16 bits with one scale. An integer is two bytes, 256 * upper + lower, both signed; so products
of bytes, which a GPU multiplies twice as fast as bfloat16, give the product of the row as exactly as its integers.
"""

# T tokens, K input channels, W words, P parts of a word

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.quantization.float8_rows import BLOCK, SMALLEST
from mgpu.worker.quantization.packing import WORDS

LARGEST = 127 * 256 + 127
"""The integer of a row's largest value."""


@dataclass(frozen=True, slots=True)
class IntegerRows:
    """``octets``: int8 [2 T, K padded to blocks of 128], channels in the order of packed words, zeros where padded.

    Row 2 t has the upper bytes of row t, row 2 t + 1 the lower ones. ``scale_T``: float32.
    """

    octets: Tensor
    scale_T: Tensor


def integer_rows(x_TK: Tensor) -> IntegerRows:
    """Return the rows as integers, by the same arithmetic as the kernel."""
    rounded_TK, scale_T = _rounded(x_TK)
    integers_TK = rounded_TK.int()
    upper_TK, lower_TK = (integers_TK + 128) >> 8, ((integers_TK + 128) & 255) - 128
    octets_2TK = torch.stack((upper_TK, lower_TK), 1).flatten(0, 1).to(torch.int8)
    blocks = F.pad(octets_2TK, (0, -x_TK.shape[1] % BLOCK)).view(len(octets_2TK), -1, 4, WORDS)
    return IntegerRows(blocks.transpose(2, 3).flatten(1).contiguous(), scale_T)


def round_integers(x_TK: Tensor) -> Tensor:
    """Return the rows as their integers stand for them, float32 in their own order."""
    rounded_TK, scale_T = _rounded(x_TK)
    return rounded_TK * scale_T[:, None]


def _rounded(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    most_T = x_TK.float().abs().amax(1).clamp_(min=SMALLEST)
    largest_T = torch.full_like(most_T, LARGEST)
    return (x_TK.float() * (largest_T / most_T)[:, None]).round(), most_T / largest_T
