"""Storage of quantized weights for `quantized_gemm`: plain torch, so that loaders can pack slice by slice.

The input channels of a row are cut into blocks of 32 words of 32 bits. Part i of word j in a block holds channel
``i * 32 + j`` of the block (4 parts of 8 bits: 128 channels; 8 parts of 4 bits: 256), so that one kernel register
pair widens to what the tensor core wants and the activations of a part are contiguous. K is padded with zeros to whole
blocks.
"""

# N output channels, K input channels, B blocks, P parts of a word, H halves of a part, W words, G groups of E channels

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

    ``scales`` is float32 [1, N] for int8 and fp8: one per output channel (those of an fp8 matrix that is made by
    `quantize` are all the same, for float8 products). For int4 it is int32 [G, N], a word per
    output channel and ``group`` input channels: two bfloat16, the scale in the low half, the offset in the high one,
    and a weight is scale * q + offset with q in [-8, 7]. bfloat16 has the range of the weights, and three digits are
    enough, since q is rounded to what is stored. Padded channels are worth the offset, not zero: products mask them.
    """

    kind: WeightKind
    words: Tensor
    scales: Tensor
    k: int
    group: int
    """Input channels that share a scale (int4: and an offset): 32, 64 or 128 for int4; 0: all of them."""


def pack_int8(q_NK: Tensor, scales_N: Tensor) -> PackedWeight:
    """Pack int8 values in [-128, 127]."""
    return PackedWeight("int8", _to_words(q_NK, 8), scales_N.float().reshape(1, -1), q_NK.shape[1], 0)


def pack_fp8(q_NK: Tensor, scales_N: Tensor) -> PackedWeight:
    """Pack float8_e4m3fn values for products with wider activations."""
    return PackedWeight("fp8", _to_words(q_NK.view(torch.uint8), 8), scales_N.float().reshape(1, -1), q_NK.shape[1], 0)


def pack_int4(q_NK: Tensor, scales_NG: Tensor, offsets_NG: Tensor, group: int) -> PackedWeight:
    """Pack integers in [-8, 7] (any integer type) with a scale and an offset per ``group`` input channels."""
    if group not in (32, 64, 128):
        raise ValueError(f"int4 groups are 32, 64 or 128 input channels, not {group}")
    pairs_NG2 = torch.stack((scales_NG, offsets_NG), dim=2).to(torch.bfloat16)
    scales_GN = pairs_NG2.view(torch.int32).squeeze(2).T.contiguous()
    return PackedWeight("int4", _to_words(q_NK + 8, 4), scales_GN, q_NK.shape[1], group)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Unpack to [N, K]: the reference of the kernels, and what the CPU multiplies by."""
    if weight.kind == "int4":
        return _dequantize_int4(weight, dtype)
    stored = _octets(weight.words, torch.int8 if weight.kind == "int8" else torch.float8_e4m3fn)
    values_NK = stored.to(torch.float32, memory_format=torch.contiguous_format).view(len(stored), -1)
    return values_NK.mul_(weight.scales.T)[:, : weight.k].to(dtype)


def _dequantize_int4(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    octets_NBPW = _octets(weight.words, torch.uint8)
    # Part 2p of a word is the low half of its octet p, part 2p + 1 the high half.
    q_NBPHW = torch.stack((octets_NBPW & 15, octets_NBPW >> 4), dim=3)
    values_NGE = q_NBPHW.view(len(q_NBPHW), -1, weight.group).to(torch.float32).sub_(8)
    pairs_GN2 = weight.scales.view(torch.bfloat16).view(*weight.scales.shape, 2).float()
    scales_NG1, offsets_NG1 = (half_GN.T[:, :, None] for half_GN in pairs_GN2.unbind(2))
    values_NGE = values_NGE[:, : len(weight.scales)].mul_(scales_NG1).add_(offsets_NG1)
    return values_NGE.reshape(len(values_NGE), -1)[:, : weight.k].to(dtype)


def _octets(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Give a view of the octets as [N, blocks, 4 parts, words]; words are little-endian."""
    return words.view(dtype).view(len(words), -1, WORDS, 4).transpose(2, 3)


def _to_words(q_NK: Tensor, bits: int) -> Tensor:
    parts = 32 // bits
    n, k = q_NK.shape
    blocks = -(-k // (WORDS * parts))
    padded = torch.full((n, blocks * WORDS * parts), 8 if bits == 4 else 0, dtype=torch.int32, device=q_NK.device)
    padded[:, :k] = q_NK.to(torch.int32) & ((1 << bits) - 1)
    parts_NBPW = padded.view(n, blocks, parts, WORDS)
    words_NBW = torch.zeros(n, blocks, WORDS, dtype=torch.int32, device=q_NK.device)
    for part in range(parts):
        words_NBW |= parts_NBPW[:, :, part] << (bits * part)
    return words_NBW.view(n, blocks * WORDS)
