"""Storage of quantized weights for `quantized_gemm`: plain torch, so that loaders can pack slice by slice.

The input channels of a row are cut into blocks of 32 words of 32 bits, and K is padded to whole blocks. Neighbouring
words hold neighbouring channels in the same part, so that a pair of words widens to what the tensor core wants:

- 8 bits, 128 channels: part i of word j holds channel ``i * 32 + j`` of the block. Word 5 holds 5, 37, 69 and 101.
- 4 bits, 256 channels: part i of word ``4 * g + t`` holds channel ``g * 32 + i * 4 + t``, t from 0 to 3. Word 5 (g = 1,
  t = 1) holds 33, 37, 41 and so on to 61. All eight channels of a word have one scale, which is then applied once per
  word; groups stay neighbours in the checkpoint, as files quantized by others have them.
"""

# N outputs, K inputs, B blocks, P parts of a word, H halves of an octet, W or T words, G groups of E inputs

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WORDS = 32
"""Words of a block."""

WeightKind = Literal["int8", "fp8", "int4"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized matrix [N, K]: ``words`` int32 [N, padded K / channels per word], contiguous.

    ``scales`` is float32 [N, 1] for int8 and fp8: one per output channel (those of an fp8 matrix that is made by
    `quantize` are all the same, for float8 products). For int4 it is int32 [N, G], a word per output channel and
    ``group`` input channels: two bfloat16, the scale in the low half, the offset in the high one, and a weight is
    scale * q + offset with q in [-8, 7]. bfloat16 has the range of the weights, and three digits are enough, since q is
    rounded to what is stored. Padded channels have the value of the offset, not zero: products mask them.
    """

    kind: WeightKind
    words: Tensor
    scales: Tensor
    k: int
    group: int
    """Input channels that share a scale (int4: and an offset): 32, 64 or 128 for int4; 0: all of them."""


def pack_int8(q_NK: Tensor, scales_N: Tensor) -> PackedWeight:
    """Pack int8 values in [-128, 127]."""
    return PackedWeight("int8", _octet_words(q_NK), scales_N.float().reshape(-1, 1), q_NK.shape[1], 0)


def pack_fp8(q_NK: Tensor, scales_N: Tensor) -> PackedWeight:
    """Pack float8_e4m3fn values for products with wider activations."""
    return PackedWeight("fp8", _octet_words(q_NK.view(torch.uint8)), scales_N.float().reshape(-1, 1), q_NK.shape[1], 0)


def pack_int4(q_NK: Tensor, scales_NG: Tensor, offsets_NG: Tensor, group: int) -> PackedWeight:
    """Pack integers in [-8, 7] (any integer type) with a scale and an offset per ``group`` input channels."""
    if group not in (32, 64, 128):
        raise ValueError(f"int4 groups are 32, 64 or 128 input channels, not {group}")
    pairs_NG2 = torch.stack((scales_NG, offsets_NG), dim=2).to(torch.bfloat16)
    scales_NG = pairs_NG2.view(torch.int32).squeeze(2)
    return PackedWeight("int4", _nibble_words(q_NK + 8), scales_NG, q_NK.shape[1], group)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Unpack to [N, K]: the reference of the kernels, and the weights that the CPU multiplies by."""
    if weight.kind == "int4":
        return _dequantize_int4(weight, dtype)
    stored = weight.words.view(torch.int8 if weight.kind == "int8" else torch.float8_e4m3fn)
    stored_NBPW = stored.view(len(stored), -1, WORDS, 4).transpose(2, 3)  # words are little-endian
    values_NK = stored_NBPW.to(torch.float32, memory_format=torch.contiguous_format).view(len(stored), -1)
    return values_NK.mul_(weight.scales)[:, : weight.k].to(dtype)


def _dequantize_int4(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    octets_NBWP = weight.words.view(torch.uint8).view(len(weight.words), -1, 4, 4)  # B: runs of 32 channels
    # Part 2p of a word is the low half of its octet p, part 2p + 1 the high half.
    q_NBPHW = torch.stack((octets_NBWP & 15, octets_NBWP >> 4), dim=3).permute(0, 1, 4, 3, 2)
    values_NGE = q_NBPHW.reshape(len(q_NBPHW), -1, weight.group).to(torch.float32).sub_(8)
    pairs_NG2 = weight.scales.view(torch.bfloat16).view(*weight.scales.shape, 2).float()
    scales_NG1, offsets_NG1 = (half_NG.unsqueeze(2) for half_NG in pairs_NG2.unbind(2))
    values_NGE = values_NGE[:, : weight.scales.shape[1]].mul_(scales_NG1).add_(offsets_NG1)
    return values_NGE.reshape(len(values_NGE), -1)[:, : weight.k].to(dtype)


def _octet_words(q_NK: Tensor) -> Tensor:
    padded_NK = _padded(q_NK, 4, filler=0)
    parts_NBPW = padded_NK.view(len(q_NK), -1, 4, WORDS)
    return _joined([parts_NBPW[:, :, part] for part in range(4)], 8)


def _nibble_words(q_NK: Tensor) -> Tensor:
    padded_NK = _padded(q_NK, 8, filler=8)
    parts_NBPT = padded_NK.view(len(q_NK), -1, 8, 4)  # B: runs of 32 channels
    return _joined([parts_NBPT[:, :, part] for part in range(8)], 4)


def _padded(q_NK: Tensor, parts: int, filler: int) -> Tensor:
    """Return the numbers as int32, of ``32 / parts`` bits each, filled up to whole blocks."""
    n, k = q_NK.shape
    blocks = -(-k // (WORDS * parts))
    padded = torch.full((n, blocks * WORDS * parts), filler, dtype=torch.int32, device=q_NK.device)
    padded[:, :k] = q_NK.to(torch.int32) & ((1 << (32 // parts)) - 1)
    return padded


def _joined(parts: list[Tensor], bits: int) -> Tensor:
    """Join parts [N, B, W] to words [N, B * W], the first in the lowest bits."""
    words = torch.zeros_like(parts[0])
    for index, part in enumerate(parts):
        words |= part << (bits * index)
    return words.view(len(words), -1)
