"""Weights of 4 and 8 bits in the tiles that the kernels for the CPU multiply by (`products.c` says how they lie).

The kernels round activations to 8 bits, 32 inputs with a step of their own, and multiply integers. Two kinds of weight
can be held so, with groups of a multiple of 32 inputs, or one scale per output:

- 4 bits: codes from 0 to 15. Scales and offsets of files are in float16 already, and kept; others are rounded to it.
- 8 bits: codes from 0 to 255, which stand for -128 to 127.
- MXFP4 and GGUF's IQ4: four bits that stand for one of 16 integers, times the scale.
"""

# T tokens, N outputs, K inputs, G groups of inputs, L tiles of outputs, E bytes of a group

import ctypes
import logging
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.cpu.library import library
from mgpu.worker.quantization.packing import (
    E2M1,
    NL4,
    PackedWeight,
    codes,
    dequantize,
    group_factors,
    pack_int8,
)

log = logging.getLogger(__name__)

_OUTPUTS, _RUN = 16, 32
"""Outputs of a tile; inputs that are rounded together."""
_AT_ONCE = 1 << 22
"""Weights that are repacked together: what that takes meanwhile is many times a tile."""
_ZERO_FP4, _ZERO_NL4 = 12, 127
_TABLES: dict[str, list[int]] = {
    "fp4": [int(2 * value) + _ZERO_FP4 for value in E2M1], "nl4": [value + _ZERO_NL4 for value in NL4],
}  # fmt: skip
"""The code of each four bits: twice the value of e2m1, and that of IQ4, moved to begin at 0."""
_LARGEST_ERROR = 2.0**-9
"""Scales that float16 holds less exactly, because they are too small or too large for it, are not rounded."""


@dataclass(frozen=True, slots=True)
class TiledWeight:
    """A weight [N, K] as `multiply` takes it."""

    tiles: Tensor
    """uint8 [L, G, E]: the codes of a group, then scales and offsets."""
    outputs: int
    inputs: int
    group: int
    bits: int
    zero: int
    """The code that stands for the offset, or for 0."""
    has_offsets: bool
    table: Tensor | None = None
    """uint8 [16]: the codes that four bits stand for; None: they are the code."""

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes

    def rows(self, rows_T: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights of some outputs, [T, K]."""
        tiles_TGE, places_T = self.tiles[rows_T // _OUTPUTS], rows_T % _OUTPUTS
        tokens, groups, _ = tiles_TGE.shape
        each = torch.arange(tokens)
        octets = tiles_TGE[..., : self.group * _OUTPUTS * self.bits // 8].view(tokens, groups, -1, _OUTPUTS, 4)
        codes_TGV4 = octets[each, :, :, places_T]
        if self.bits == 4:
            codes_TGV4 = torch.stack((codes_TGV4 & 15, codes_TGV4 >> 4), dim=3)
        if self.table is not None:
            codes_TGV4 = self.table[codes_TGV4.int()]
        numbers_TGP = tiles_TGE[..., self.group * _OUTPUTS * self.bits // 8 :].contiguous().view(torch.float16)
        scales_TG1 = numbers_TGP[each, :, places_T].unsqueeze(2).float()
        values = codes_TGV4.reshape(tokens, groups, self.group).float().sub_(self.zero).mul_(scales_TG1)
        if self.has_offsets:
            values.add_(numbers_TGP[each, :, _OUTPUTS + places_T].unsqueeze(2).float())
        return values.view(tokens, self.inputs).to(dtype)


def tiled(weight: PackedWeight) -> TiledWeight | None:
    """Return the weight in tiles; None if the kernels cannot hold it, or there are none."""
    group = weight.group or weight.k
    is_grouped = group % _RUN == 0 and weight.k % group == 0 and weight.order is None
    if weight.kind not in ("int4", "int8", *_TABLES) or not is_grouped or not has_kernels():
        return None
    return _tiled(weight)


def multiply(x_TK: Tensor, weight: TiledWeight) -> Tensor:
    """Return ``x @ w.T``, both in bfloat16."""
    x_TK, tokens = x_TK.contiguous(), len(x_TK)
    y_TN = torch.empty((tokens, weight.outputs), dtype=torch.bfloat16)
    room = torch.empty(tokens * (weight.inputs + weight.inputs // 4), dtype=torch.uint8)
    pointers = y_TN.data_ptr(), x_TK.data_ptr(), tokens, weight.tiles.data_ptr()
    sizes = weight.outputs, weight.inputs, weight.group, weight.bits, weight.zero, weight.has_offsets
    _kernel()(*pointers, *sizes, None if weight.table is None else weight.table.data_ptr(), room.data_ptr())
    return y_TN


@cache
def has_kernels() -> bool:
    """Try the kernels once; without a compiler, or with a wrong number, weights stay as they are."""
    if library() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 128, generator=generator).to(torch.bfloat16)
    q = torch.randint(-128, 128, (48, 128), generator=generator)
    weight = pack_int8(q, torch.rand(48, generator=generator))
    expected = x.float() @ dequantize(weight, torch.float32).T
    held = _tiled(weight)
    assert held is not None
    if not (multiply(x, held).float() - expected).abs().max() <= 0.02 * expected.abs().max():
        log.warning("kernels for the CPU multiply wrongly here: torch computes instead")
        return False
    log.info("products of 4 and 8 bits round activations to 8 bits; --dtype float32 rounds none")
    return True


@cache
def _kernel() -> "ctypes._NamedFuncPointer":
    kernels = library()
    assert kernels is not None, "weights are in tiles only if there are kernels"
    function = kernels.mgpu_multiply
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    sizes = [long, long, long, integer, integer, integer]
    function.argtypes = [pointer, pointer, long, pointer, *sizes, pointer, pointer]
    function.restype = None
    return function


def _tiled(weight: PackedWeight) -> TiledWeight | None:
    bits, group, outputs = (8 if weight.kind == "int8" else 4), weight.group or weight.k, len(weight.words)
    _, offsets, zero = steps_of(weight.outputs(0, weight.rows))
    octets = group * _OUTPUTS * bits // 8 + 2 * _OUTPUTS * (1 if offsets is None else 2)
    tiles_LGE = torch.empty((-(-outputs // _OUTPUTS), weight.k // group, octets), dtype=torch.uint8)
    step = max(1, _AT_ONCE // (weight.k * _OUTPUTS * weight.rows)) * _OUTPUTS * weight.rows
    for first in range(0, outputs, step):
        part = _tile_part(weight.outputs(first, min(outputs, first + step)), group, bits)
        if part is None:
            return None
        tiles_LGE[first // _OUTPUTS : first // _OUTPUTS + len(part)] = part
    table = torch.tensor(_TABLES[weight.kind], dtype=torch.uint8) if weight.kind in _TABLES else None
    return TiledWeight(tiles_LGE, outputs, weight.k, group, bits, zero, offsets is not None, table)


def _tile_part(weight: PackedWeight, group: int, bits: int) -> Tensor | None:
    """Return the tiles of some outputs; None if float16 cannot hold their scales."""
    scales_NG, offsets_NG, _ = steps_of(weight)
    numbers = [scales_NG] if offsets_NG is None else [scales_NG, offsets_NG]
    rounded = [each.to(torch.float16) for each in numbers]
    if weight.kind == "fp4" and _differ(scales_NG, rounded[0], scales_NG):
        # The scale of a block of zeros does not matter.
        has_others_NG = ((codes(weight)[:, : weight.k] & 7) > 0).view(*scales_NG.shape, group).any(2)
        numbers = [torch.where(has_others_NG, scales_NG, 0.0)]
        rounded = [numbers[0].to(torch.float16)]
    # An offset near 0 may be rounded to what is small beside a step between two codes.
    if any(_differ(*pair, numbers[0]) for pair in zip(numbers, rounded, strict=True)):
        return None
    return torch.cat((_tiled_codes(weight, group, bits), *map(_tiled_numbers, rounded)), dim=2)


def steps_of(weight: PackedWeight) -> tuple[Tensor, Tensor | None, int]:
    """Return float32 [N, G] each: the step between two codes of a group, and what a code stands for; and that code.

    The second is None if the code stands for 0 in all groups.
    """
    middle = {"int4": 8, "int8": 128, "fp4": _ZERO_FP4, "nl4": _ZERO_NL4}[weight.kind]
    if weight.has_pairs:
        groups = weight.k // weight.group
        pairs_NG2 = weight.scales.view(torch.bfloat16).view(*weight.scales.shape, 2)[:, :groups].float()
        return pairs_NG2[..., 0], pairs_NG2[..., 1], middle
    if weight.supers is not None or weight.offsets is not None:
        scales_NG, offsets_NG = group_factors(weight)
        return scales_NG, offsets_NG, middle if offsets_NG is None else 0
    is_power = weight.scales.dtype == torch.uint8
    scales_RG = torch.exp2(weight.scales.float() - 127) if is_power else weight.scales.float()
    scales_NG = scales_RG.repeat_interleave(weight.rows, 0)[: len(weight.words)]
    if weight.kind == "fp4":
        scales_NG = scales_NG / 2
    return scales_NG, None if weight.zeros is None else -weight.zeros.float() * scales_NG, middle


def _differ(numbers: Tensor, rounded: Tensor, steps: Tensor) -> bool:
    sizes = torch.maximum(numbers.abs(), steps.abs())
    return not bool(((rounded.float() - numbers).abs() <= _LARGEST_ERROR * sizes).all())


def _tiled_codes(weight: PackedWeight, group: int, bits: int) -> Tensor:
    """Return the codes as tiles have them, uint8 [L, G, bytes].

    Only bytes move. Of 4 bits, octet v of word i of a run of 32 inputs has the codes of inputs 8 * v + i and
    8 * v + 4 + i, and so has byte i of an output in vector v of the run. Of 8 bits, octet i of word j of a block of 128
    inputs is that of input 32 * i + j.
    """
    octets_NB = weight.words.view(torch.uint8).view(len(weight.words), -1)
    octets_NB = F.pad(octets_NB, (0, 0, 0, -len(octets_NB) % _OUTPUTS))
    if bits == 4:
        runs = octets_NB.view(-1, _OUTPUTS, octets_NB.shape[1] // 16, 4, 4).permute(0, 2, 4, 1, 3)
    else:
        blocks = octets_NB.view(-1, _OUTPUTS, octets_NB.shape[1] // 128, 8, 4, 4).permute(0, 2, 5, 3, 1, 4)
        runs = blocks.flatten(1, 2)
    tiles_LGE = runs[:, : weight.k // _RUN].reshape(len(runs), weight.k // group, -1)
    return tiles_LGE if bits == 4 else tiles_LGE ^ 128


def _tiled_numbers(numbers_NG: Tensor) -> Tensor:
    padded_NG = F.pad(numbers_NG, (0, 0, 0, -len(numbers_NG) % _OUTPUTS))
    return padded_NG.view(-1, _OUTPUTS, numbers_NG.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)
