"""Weights that stay packed: how they are stored, packed, cut and dequantized. Plain torch, so that loaders can use it.

The input channels of a row are cut into blocks of 32 words of 32 bits, and K is padded to whole blocks. Neighbouring
words hold neighbouring channels in the same part, so that a pair of words widens to what the tensor core wants:

- 8 bits, 128 channels: part i of word j holds channel ``i * 32 + j`` of the block. Word 5 holds 5, 37, 69 and 101.
- 4 bits, 256 channels: part i of word ``4 * g + t`` holds channel ``g * 32 + i * 4 + t``, t from 0 to 3. Word 5 (g = 1,
  t = 1) holds 33, 37, 41 and so on to 61. All eight channels of a word have one scale, which is then applied once per
  word; groups stay neighbours in the checkpoint, as files quantized by others have them.
"""

# N outputs, K inputs, B blocks, P parts of a word, H halves of an octet, W or T words, G groups of E inputs
# R outputs or groups of outputs with scales of their own, S stacked matrices

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

WORDS = 32
"""Words of a block."""

WeightKind = Literal["int8", "fp8", "int4", "fp4", "nl4", "int6", "int5", "int3", "int2"]
"""Integers of so many bits, e4m3, e2m1 (MXFP4), or the 16 values of GGUF's IQ4."""
KIND_OF: dict[str, WeightKind] = {
    "8": "int8", "fp8": "fp8", "4": "int4", "fp4": "fp4", "nl4": "nl4", "6": "int6", "5": "int5", "3": "int3",
    "2": "int2",
}  # fmt: skip
"""By the name that a `WeightFormat` has for what the q are."""
SUPER_BLOCK = 256
"""Inputs that share a scale of scales."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the four bits of a kind fp4 stand for."""
NL4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the four bits of a kind nl4 stand for, from ggml's table kvalues_iq4nl."""
MIDDLES: dict[WeightKind, int] = {"int6": 32, "int5": 16, "int4": 8, "int3": 4}
"""What is subtracted from codes to make q signed, unless the weight has offsets."""
HIGH_BITS: dict[WeightKind, int] = {"int6": 2, "int5": 1, "int3": 1}
"""Bits of a code that are in ``high``."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed matrix [N, K], or a stack of such with one more dimension in front of each tensor.

    ``words``: int32 [N, padded K / channels per word], contiguous. Padded channels need not stand for zero.

    A weight of ``--quant`` has ``scales`` float32 [N, 1] for int8 and fp8 (those of an fp8 matrix are all the same, for
    float8 products). For int4 they are int32 [N, G], a word per output channel and ``group`` input channels: two
    bfloat16, the scale in the low half, the offset in the high one, and a weight is scale * q + offset with q in
    [-8, 7]. bfloat16 has the range of the weights, and three digits are enough, since q is rounded to what is stored.

    A weight of a quantized checkpoint is (q - zero) * scale, with the numbers of the file. ``scales`` [R, G] have its
    type (float32 if G is 1); uint8 stands for powers of two with a bias of 127. ``rows`` outputs share them. ``zeros``:
    integers [N, G]. ``order``: int32 [S, K], the group of each input, for each of S stacked matrices, which end at
    the rows ``ends``.
    """

    kind: WeightKind
    words: Tensor
    scales: Tensor
    k: int
    group: int
    """Input channels that share a scale (int4: and an offset): 32, 64 or 128 for ``--quant 4``; 0: all of them."""
    rows: int = 1
    zeros: Tensor | None = None
    order: Tensor | None = None
    ends: tuple[int, ...] = ()
    high: Tensor | None = None
    """Upper bits of the codes, one for kinds int5 and int3, two for int6: part i of word j has them where its lower
    ones are in ``words``. uint8 or int16 [N, words]."""
    offsets: Tensor | None = None
    """Added to q * scale, [N, G]: the codes are then not moved to be signed. Bytes are multiplied by the second of
    ``supers`` and subtracted."""
    supers: Tensor | None = None
    """float16 [N, blocks of 256 inputs, 1 or 2]: what multiplies ``scales``, which are integers then. The bytes of a
    kind int2 have the scale in the lower half and the offset in the upper one."""
    power: Tensor | None = None
    """float32 [1], if many rows are multiplied in float8: what brings the largest weight near the largest float8."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def has_pairs(self) -> bool:
        """True for int4 weights of ``--quant``."""
        return self.scales.dtype == torch.int32

    @property
    def is_simple(self) -> bool:
        """True if the kernels for weights of ``--quant`` take it: pairs for int4, else a scale per output channel."""
        return self.has_pairs or (self.kind in ("int8", "fp8") and self.group == 0 and self.zeros is None)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in _TENSORS if getattr(self, name) is not None)

    def by_output(self) -> tuple[Tensor, ...]:
        """Return the tensors that have a row for each output, if ``rows`` is 1."""
        return tuple(tensor for tensor in self.tensors() if tensor is not self.order and tensor is not self.power)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "PackedWeight":
        """Return the weight with each of its tensors replaced."""
        found: dict[str, Any] = {
            name: change(getattr(self, name)) for name in _TENSORS if getattr(self, name) is not None
        }
        return replace(self, **found)

    def outputs(self, first: int, end: int) -> "PackedWeight":
        """Return some outputs, from a border of ``rows`` on, of a single matrix; copies nothing."""
        ends = tuple(max(0, min(each, end) - first) for each in self.ends)
        cut = replace(self, scales=self.scales[first // self.rows : -(-end // self.rows)], ends=ends)
        names = ("words", "zeros", "high", "offsets", "supers")
        parts: dict[str, Any] = {
            name: getattr(self, name)[first:end] for name in names if getattr(self, name) is not None
        }
        return replace(cut, **parts)


_TENSORS = ("words", "scales", "zeros", "order", "high", "offsets", "supers", "power")
"""The fields of a `PackedWeight` that are tensors."""


def pack_int8(q_NK: Tensor, scales_N: Tensor) -> PackedWeight:
    """Pack int8 values in [-128, 127]."""
    return PackedWeight("int8", octet_words(q_NK), scales_N.float().reshape(-1, 1), q_NK.shape[1], 0)


def pack_fp8(q_NK: Tensor, scales_N: Tensor) -> PackedWeight:
    """Pack float8_e4m3fn values for products with wider activations."""
    return PackedWeight("fp8", octet_words(q_NK.view(torch.uint8)), scales_N.float().reshape(-1, 1), q_NK.shape[1], 0)


def pack_int4(q_NK: Tensor, scales_NG: Tensor, offsets_NG: Tensor, group: int) -> PackedWeight:
    """Pack integers in [-8, 7] (any integer type) with a scale and an offset per ``group`` input channels."""
    if group not in (32, 64, 128):
        raise ValueError(f"int4 groups are 32, 64 or 128 input channels, not {group}")
    pairs_NG2 = torch.stack((scales_NG, offsets_NG), dim=2).to(torch.bfloat16)
    scales_NG = pairs_NG2.view(torch.int32).squeeze(2)
    return PackedWeight("int4", nibble_words(q_NK + 8), scales_NG, q_NK.shape[1], group)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Unpack to [N, K]: the reference of the kernels, and the weights that the CPU multiplies by."""
    if weight.has_pairs:
        return _dequantize_int4(weight, dtype)
    if weight.order is not None and len(weight.order) > 1:
        return torch.cat([dequantize(part, dtype) for part in ordered_parts(weight)])
    values_NK = unpack(weight)
    if weight.supers is not None or weight.offsets is not None:
        return _with_offsets(values_NK, weight).to(dtype)
    if weight.zeros is not None:
        values_NK.sub_(_per_input(weight.zeros.float(), weight))
    scales_RG = torch.exp2(weight.scales.float() - 127) if weight.scales.dtype == torch.uint8 else weight.scales.float()
    scales_NG = scales_RG.repeat_interleave(weight.rows, 0)[: len(values_NK)] if weight.rows > 1 else scales_RG
    return values_NK.mul_(_per_input(scales_NG, weight)).to(dtype)


def unpack(weight: PackedWeight) -> Tensor:
    """Return what the words hold, float32 [N, K]: the q."""
    if weight.kind in ("fp4", "nl4"):
        table = torch.tensor(E2M1 if weight.kind == "fp4" else NL4, dtype=torch.float32, device=weight.words.device)
        return table[codes(weight)[:, : weight.k].int()]
    if weight.kind not in ("int8", "fp8"):
        values_NK = codes(weight)[:, : weight.k].to(torch.float32)
        return values_NK if weight.offsets is not None else values_NK.sub_(MIDDLES.get(weight.kind, 0))
    stored = weight.words.view(torch.int8 if weight.kind == "int8" else torch.float8_e4m3fn)
    stored_NBPW = stored.view(len(stored), -1, WORDS, 4).transpose(2, 3)  # words are little-endian
    values_NK = stored_NBPW.to(torch.float32, memory_format=torch.contiguous_format).view(len(stored), -1)
    return values_NK[:, : weight.k]


def group_factors(weight: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Return scales and offsets of the groups of a weight of GGUF, float32 [N, G]."""
    scales_NG, offsets_NG = weight.scales, weight.offsets
    if weight.supers is None:
        return scales_NG.float(), None if offsets_NG is None else offsets_NG.float()
    if weight.kind == "int2":
        scales_NG, offsets_NG = scales_NG & 15, scales_NG >> 4
    supers_NG2 = weight.supers.float().repeat_interleave(SUPER_BLOCK // weight.group, 1)[:, : scales_NG.shape[1]]
    scales_NG = scales_NG.float() * supers_NG2[:, :, 0]
    return scales_NG, None if offsets_NG is None else offsets_NG.float().mul_(supers_NG2[:, :, 1]).neg_()


def _with_offsets(q_NK: Tensor, weight: PackedWeight) -> Tensor:
    """Return q * scale + offset. Rows are whole groups."""
    scales_NG, offsets_NG = group_factors(weight)
    values_NGE = q_NK.view(len(q_NK), -1, weight.group).mul_(scales_NG[:, :, None])
    if offsets_NG is not None:
        values_NGE.add_(offsets_NG[:, :, None])
    return values_NGE.view(q_NK.shape)


def _per_input(numbers_NG: Tensor, weight: PackedWeight) -> Tensor:
    """Return each output's numbers for its inputs, [N, K], or [N, 1] where all inputs share one."""
    if weight.order is not None:
        return numbers_NG[:, weight.order[0].long()]
    if numbers_NG.shape[1] == 1:
        return numbers_NG
    return numbers_NG.repeat_interleave(weight.group, 1)[:, : weight.k]


def ordered_parts(weight: PackedWeight) -> list[PackedWeight]:
    """Return the matrices of a stack of which each has its own order, else the stack; none without rows."""
    if weight.order is None:
        return [weight]
    firsts = (0, *weight.ends)
    return [
        replace(weight.outputs(first, end), order=weight.order[index : index + 1], ends=(end - first,))
        for index, (first, end) in enumerate(zip(firsts, weight.ends, strict=False))
        if end > first
    ]


def _dequantize_int4(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    q_NK = _nibbles(weight.words)
    values_NGE = q_NK.view(len(q_NK), -1, weight.group).to(torch.float32).sub_(8)
    pairs_NG2 = weight.scales.view(torch.bfloat16).view(*weight.scales.shape, 2).float()
    scales_NG1, offsets_NG1 = (half_NG.unsqueeze(2) for half_NG in pairs_NG2.unbind(2))
    values_NGE = values_NGE[:, : weight.scales.shape[1]].mul_(scales_NG1).add_(offsets_NG1)
    return values_NGE.reshape(len(values_NGE), -1)[:, : weight.k].to(dtype)


def codes(weight: PackedWeight) -> Tensor:
    """Return the code of each channel, uint8 [N, padded K]."""
    is_nibble = weight.words.dtype == torch.int32
    codes_NK = _nibbles(weight.words) if is_nibble else _parts_of(weight.words, 2)
    if weight.high is not None:
        codes_NK |= _parts_of(weight.high, HIGH_BITS[weight.kind]) << (4 if is_nibble else 2)
    return codes_NK


def _parts_of(words_NW: Tensor, bits: int) -> Tensor:
    """Return the parts of words of eight channels in the channels' order, uint8."""
    shifts_P = torch.arange(0, 8 * bits, bits, dtype=torch.int32, device=words_NW.device)
    parts_NWP = ((words_NW.to(torch.int32)[:, :, None] >> shifts_P) & ((1 << bits) - 1)).to(torch.uint8)
    return parts_NWP.view(len(words_NW), -1, 4, 8).transpose(2, 3).reshape(len(words_NW), -1)


def run_words(codes_NK: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return words of eight channels each, of codes of so many bits. Rows are whole runs of 32."""
    parts_NRPT = codes_NK.view(len(codes_NK), -1, 8, 4).to(torch.int32)
    words_NRT = torch.zeros_like(parts_NRPT[:, :, 0])
    for part in range(8):
        words_NRT |= parts_NRPT[:, :, part] << (bits * part)
    return words_NRT.to(dtype).view(len(codes_NK), -1)


def _nibbles(words: Tensor) -> Tensor:
    """Return the four bits of each channel, uint8 [N, padded K]."""
    octets_NBWP = words.view(torch.uint8).view(len(words), -1, 4, 4)  # B: runs of 32 channels
    # Part 2p of a word is the low half of its octet p, part 2p + 1 the high half.
    q_NBPHW = torch.stack((octets_NBWP & 15, octets_NBWP >> 4), dim=3).permute(0, 1, 4, 3, 2)
    return q_NBPHW.reshape(len(words), -1)


def octet_words(q_NK: Tensor) -> Tensor:
    """Return the words of 8-bit values."""
    parts_NBPW = _padded(q_NK, 4, filler=0).view(len(q_NK), -1, 4, WORDS)
    return _words(parts_NBPW.transpose(2, 3))


def nibble_words(codes_NK: Tensor) -> Tensor:
    """Return the words of values in [0, 15], of any integer type."""
    octets = _padded(codes_NK, 8, filler=8) & 15
    halves_NBPHT = octets.view(len(codes_NK), -1, 4, 2, 4)  # B: runs of 32 channels; P: octets of a word
    octets_NBPT = halves_NBPHT[:, :, :, 0] | (halves_NBPHT[:, :, :, 1] << 4)
    return _words(octets_NBPT.transpose(2, 3))


def _padded(q_NK: Tensor, parts: int, filler: int) -> Tensor:
    """Return the lowest octets of the numbers, uint8, of ``parts`` to a word, filled up to whole blocks."""
    n, k = q_NK.shape
    blocks = -(-k // (WORDS * parts))
    padded = torch.empty((n, blocks * WORDS * parts), dtype=torch.uint8, device=q_NK.device)
    padded[:, :k] = q_NK if q_NK.dtype != torch.int8 else q_NK.view(torch.uint8)
    padded[:, k:] = filler
    return padded


def _words(octets: Tensor) -> Tensor:
    """Return the words, int32 [N, W], whose octets [N, ..., 4] are the last dimension, the lowest first."""
    return octets.contiguous().view(torch.int32).view(len(octets), -1)
