"""Bring blocks of GGUF into packed words: codes, scales and offsets as they are stored, nothing rounded.

Layouts of blocks are those of ggml's ggml-common.h. B blocks of a row lie side by side.
"""

# N outputs, K inputs, B blocks of a row, S bytes of a block, G groups

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.files.tensors import BLOCKS, PackedParts, TensorEntry
from mgpu.worker.loaders.unpack import ReadBlock, broken, too_large
from mgpu.worker.quantization.packing import HIGH_BITS, KIND_OF, PackedWeight, octet_words, run_words


@dataclass(frozen=True, slots=True)
class Blocks:
    """What blocks hold: ``codes`` uint8 (Q8_0: int8) [N, B, elements]; the rest as in `PackedWeight`, by block."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    supers: Tensor | None = None


def unpack_blocks(
    parts: PackedParts, read: ReadBlock, rows: range, columns: Sequence[range]
) -> tuple[PackedWeight, Tensor]:
    """Return some outputs and inputs of a matrix, and whether any number of them is not finite, a bool on the device.

    The inputs are whole blocks. Those of several ranges lie side by side in what is returned. CheckpointError.
    """
    form, entry = parts.form, parts.values
    kind = form.source.removeprefix("GGUF ")
    elements, size = BLOCKS[kind]
    assert all(edge % elements == 0 for part in columns for edge in (part.start, part.stop)), "columns are whole blocks"
    wanted = range(parts.first_row + rows.start, parts.first_row + rows.stop)
    octets = [range(part.start // elements * size, part.stop // elements * size) for part in columns]
    raw = [read(entry, wanted, part).view(len(rows), -1, size) for part in octets]
    found = _UNPACKERS[kind](raw[0] if len(raw) == 1 else torch.cat(raw, dim=1))
    codes_NK, held = found.codes.flatten(1), KIND_OF[form.quant]
    words, high = _words(codes_NK, form.quant)
    scales_NG = found.scales.flatten(1)
    offsets_NG = None if found.offsets is None else found.offsets.flatten(1)
    weight = PackedWeight(
        held, words, scales_NG, sum(map(len, columns)), form.group, high=high, offsets=offsets_NG, supers=found.supers
    )
    return weight, _is_bad(found)


def _is_bad(found: Blocks) -> Tensor:
    """Return True if a number is not finite, without waiting for the device."""
    if found.supers is None and found.scales.dtype == torch.uint8:
        return too_large(found.scales)
    numbers = [each for each in (found.scales, found.offsets, found.supers) if each is not None]
    flags = [~torch.isfinite(each).all() for each in numbers if each.is_floating_point()]
    return torch.stack(flags).any()


def check_finite(entries: Sequence[TensorEntry], flags: Sequence[Tensor]) -> None:
    """Raise CheckpointError for the first tensor whose flag is set; waits for the device once."""
    for entry, is_bad in zip(entries, torch.stack(list(flags)).tolist(), strict=True):
        if is_bad:
            raise broken(entry, "holds NaN or infinity")


def _words(codes_NK: Tensor, quant: str) -> tuple[Tensor, Tensor | None]:
    """Return the words of codes, and their upper bits."""
    if quant == "8":
        return octet_words(codes_NK), None
    low_bits = 2 if quant in ("2", "3") else 4
    low = codes_NK & ((1 << low_bits) - 1)
    words = run_words(low, low_bits, torch.int16 if low_bits == 2 else torch.int32)
    high_bits = HIGH_BITS.get(KIND_OF[quant], 0)
    if not high_bits:
        return words, None
    return words, run_words(codes_NK >> low_bits, high_bits, torch.int16 if high_bits == 2 else torch.uint8)


def _halves(blocks_NBS: Tensor, first: int, count: int = 1) -> Tensor:
    """Return float16 numbers of each block, [N, B, count]."""
    return blocks_NBS[:, :, first : first + 2 * count].contiguous().view(torch.float16)


def _split(octets: Tensor, bits: int, run: int) -> Tensor:
    """Return the codes of octets [N, B, *]: of each ``run`` octets first all lowest bits, then the next, and so on."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device)[:, None]
    runs = octets.reshape(*octets.shape[:2], -1, 1, run)
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(2)


def _q4_0(blocks: Tensor) -> Blocks:
    return Blocks(_split(blocks[:, :, 2:], 4, 16), _halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Blocks:
    return Blocks(_split(blocks[:, :, 4:], 4, 16), _halves(blocks, 0), _halves(blocks, 2))


def _fifth_bits(octets_NB4: Tensor) -> Tensor:
    """Return bit i of each block as the fifth bit of code i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=octets_NB4.device)
    return ((octets_NB4.unsqueeze(3) >> shifts) & 1).flatten(2) << 4


def _q5_0(blocks: Tensor) -> Blocks:
    return Blocks(_split(blocks[:, :, 6:], 4, 16) | _fifth_bits(blocks[:, :, 2:6]), _halves(blocks, 0))


def _q5_1(blocks: Tensor) -> Blocks:
    codes = _split(blocks[:, :, 8:], 4, 16) | _fifth_bits(blocks[:, :, 4:8])
    return Blocks(codes, _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: Tensor) -> Blocks:
    return Blocks(blocks[:, :, 2:].contiguous().view(torch.int8), _halves(blocks, 0))


def _mxfp4(blocks: Tensor) -> Blocks:
    return Blocks(_split(blocks[:, :, 1:], 4, 16), blocks[:, :, :1])


def _q2_k(blocks: Tensor) -> Blocks:
    return Blocks(_split(blocks[:, :, 16:80], 2, 32), blocks[:, :, :16], supers=_halves(blocks, 80, 2))


def _q3_k(blocks: Tensor) -> Blocks:
    codes = _split(blocks[:, :, 32:96], 2, 32) | (_split(blocks[:, :, :32], 1, 32) << 2)
    low, high = _split(blocks[:, :, 96:104], 4, 8), _split(blocks[:, :, 104:108], 2, 4)
    scales = (low | (high << 4)).view(torch.int8) - 32
    return Blocks(codes, scales, supers=_halves(blocks, 108))


def _scales_and_minima(octets_NB12: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8 scales and 8 minima of 6 bits each."""
    first, second, rest = octets_NB12.chunk(3, dim=2)
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=2)
    return scales, torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=2)


def _q4_k(blocks: Tensor) -> Blocks:
    scales, minima = _scales_and_minima(blocks[:, :, 4:16])
    return Blocks(_split(blocks[:, :, 16:], 4, 32), scales, minima, _halves(blocks, 0, 2))


def _q5_k(blocks: Tensor) -> Blocks:
    scales, minima = _scales_and_minima(blocks[:, :, 4:16])
    codes = _split(blocks[:, :, 48:], 4, 32) | (_split(blocks[:, :, 16:48], 1, 32) << 4)
    return Blocks(codes, scales, minima, _halves(blocks, 0, 2))


def _q6_k(blocks: Tensor) -> Blocks:
    codes = _split(blocks[:, :, :128], 4, 64) | (_split(blocks[:, :, 128:192], 2, 32) << 4)
    return Blocks(codes, blocks[:, :, 192:208].contiguous().view(torch.int8), supers=_halves(blocks, 208))


def _iq4_nl(blocks: Tensor) -> Blocks:
    return Blocks(_split(blocks[:, :, 2:], 4, 16), _halves(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Blocks:
    low = _split(blocks[:, :, 4:8], 4, 1)
    high = _split(blocks[:, :, 2:4], 2, 1)
    scales = (low | (high << 4)).view(torch.int8) - 32
    return Blocks(_split(blocks[:, :, 8:], 4, 16), scales, supers=_halves(blocks, 0))


_UNPACKERS: dict[str, Callable[[Tensor], Blocks]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "MXFP4": _mxfp4, "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
