"""Read some rows and columns of a packed matrix of a checkpoint: its values, scales and zero points, one by one.

A matrix has N outputs (rows) and K inputs (columns). Words are I32 of P = 32 / bits values, the first in the lowest
bits. Unsigned values and zero points are moved to be signed, so a weight is always (q - zero) * scale.

| packing | values | scales | zero points |
| --- | --- | --- | --- |
| rows | [N, K], I8 or F8_E4M3 | one, [N], [N, G], or blocks | [N, G], I8 |
| words (compressed-tensors) | [N, K / P] | [N, G] | [N / P, G] |
| gptq | [K / P, N] | [G, N] | [G, N / P], 1 too small in the first version |
| awq | [K, N / 8], in another order | [G, N] | [G, N / 8], in the same order |
| mxfp4 | [N, K / 2], U8, the low half first | [N, K / 32], exponents | |
"""

# N outputs, K inputs, P values of a word, G groups

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.files.tensors import PackedParts, TensorEntry
from mgpu.protocol.checkpoint.read import CheckpointError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each four bits of a word of AWQ belong to, lowest bits first."""

_CODE_BITS = 9
"""Of the largest number that a code of 8 bits and a zero point, or e4m3, stand for."""

ReadBlock = Callable[[TensorEntry, range, range], Tensor]
"""Returns stored rows and columns of a stored matrix; rows may have a step."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Some outputs and inputs of a matrix."""

    values: Tensor
    """[N, K]: int8, float8_e4m3fn, or uint8 codes of e2m1."""
    scales: Tensor
    """[N, G], or [N, 1]."""
    zeros: Tensor | None
    """int16 [N, G]."""


def unpack_rows(parts: PackedParts, read: ReadBlock, rows: range, columns: range, groups: range) -> Unpacked:
    """Return the stored numbers of some outputs and inputs, and of ``groups`` of their inputs. CheckpointError."""
    wanted = range(parts.first_row + rows.start * parts.row_step, parts.first_row + rows.stop * parts.row_step)
    stored = range(wanted.start, wanted.stop, parts.row_step)
    scales = _scales(parts, read, stored, groups)
    if not _is_finite(scales):
        raise broken(parts.scales, "holds NaN or infinity")
    if not scales_fit(scales):
        raise broken(parts.scales, "holds scales with which weights do not fit float32")
    values = _values(parts, read, stored, columns)
    if values.dtype == torch.float8_e4m3fn and (values.view(torch.uint8) & 0x7F == 0x7F).any():
        raise broken(parts.values, "holds NaN")
    return Unpacked(values, scales, _zeros(parts, read, stored, groups))


def read_order(parts: PackedParts, read: ReadBlock, columns: range) -> Tensor | None:
    """Return the group of some inputs, int32 [K], where they may be in any; None where they are in order.

    CheckpointError when a group does not exist, or when the groups are not in order although they should be.
    """
    if parts.order is None:
        return None
    order_K: Tensor = read(parts.order, range(1), columns)[0]
    groups = max(parts.scales.shape[0] if parts.packing == "gptq" else parts.scales.shape[-1], 1)
    if len(order_K) and not 0 <= int(order_K.min()) <= int(order_K.max()) < groups:
        raise broken(parts.order, f"names groups outside of the {groups} that there are")
    if parts.form.is_ordered:
        return order_K.to(torch.int32)
    group = parts.form.group
    plain_K = torch.arange(columns.start, columns.stop, device=order_K.device) // group if group else 0 * order_K
    if not torch.equal(order_K.long(), plain_K.long()):
        raise broken(parts.order, "puts inputs into groups out of order, but the configuration says no act-order")
    return None


def broken(entry: TensorEntry, problem: str) -> CheckpointError:
    """Return the error for a tensor with numbers that cannot be."""
    return CheckpointError(f"tensor {entry.name!r} in {entry.file} {problem}: the file is corrupt; download it again")


def _is_finite(scales: Tensor) -> bool:
    if scales.dtype == torch.uint8:  # 255 stands for NaN
        return not bool((scales == 255).any())
    return bool(torch.isfinite(scales.float()).all())


def scales_fit(scales: Tensor) -> bool:
    """Return True if no weight can be infinite: scales times the largest number that codes can stand for."""
    if scales.dtype == torch.uint8:
        return not bool(too_large(scales))
    return bool(torch.isfinite(scales.float() * (1 << _CODE_BITS)).all())


def too_large(exponents: Tensor) -> Tensor:
    """Return True if a power of two is NaN, or so large that no weight with it fits float32."""
    return (exponents >= 255 - _CODE_BITS).any()


def _values(parts: PackedParts, read: ReadBlock, rows: range, columns: range) -> Tensor:
    entry, per_word = parts.values, 32 // parts.bits
    if parts.packing == "rows":
        values = read(entry, rows, columns)
        return values if values.dtype == torch.int8 else values.view(torch.float8_e4m3fn)
    if parts.packing == "mxfp4":
        octets = read(entry, rows, range(columns.start // 2, -(-columns.stop // 2)))
        codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
        return codes[:, columns.start % 2 :][:, : len(columns)]
    if parts.packing == "awq":
        return _signed(_awq_columns(entry, read, columns, rows), 4).T
    words = range(columns.start // per_word, -(-columns.stop // per_word))
    skip = columns.start - words.start * per_word
    if parts.packing == "gptq":
        codes = _split(read(entry, words, rows), parts.bits, dim=0)
        return _signed(codes[skip : skip + len(columns)], parts.bits).T
    codes = _split(read(entry, rows, words), parts.bits, dim=1)
    return _signed(codes[:, skip : skip + len(columns)], parts.bits)


def _scales(parts: PackedParts, read: ReadBlock, rows: range, groups: range) -> Tensor:
    """Return [N, G]. One scale of a whole matrix counts for each output."""
    entry, shape = parts.scales, parts.scales.shape
    if parts.packing in ("gptq", "awq"):
        return read(entry, groups, rows).T
    if len(shape) < 2:
        total = shape[0] if shape else 1
        stored = read(entry, range(1), range(total))[0]
        return stored.expand(len(rows))[:, None] if total == 1 else stored[rows.start : rows.stop, None]
    if shape[0] == 1:
        return read(entry, range(1), groups).expand(len(rows), len(groups))
    if (shared := parts.block_rows) == 1:
        return read(entry, rows, groups)
    blocks = range(rows.start // shared, -(-rows.stop // shared))
    stored = read(entry, blocks, groups)
    return stored[torch.arange(rows.start, rows.stop, device=stored.device) // shared - blocks.start]


def _zeros(parts: PackedParts, read: ReadBlock, rows: range, groups: range) -> Tensor | None:
    entry, per_word = parts.zeros, 32 // parts.bits
    if entry is None:
        return None
    if parts.packing == "rows":
        return read(entry, rows, groups).to(torch.int16)
    if parts.packing == "awq":
        return _signed(_awq_columns(entry, read, groups, rows), 4, parts.zero_bias).T
    words = range(rows.start // per_word, -(-rows.stop // per_word))
    skip = rows.start - words.start * per_word
    if parts.packing == "gptq":
        codes = _split(read(entry, groups, words), parts.bits, dim=1)
        return _signed(codes[:, skip : skip + len(rows)], parts.bits, parts.zero_bias).T
    codes = _split(read(entry, words, groups), parts.bits, dim=0)
    return _signed(codes[skip : skip + len(rows)], parts.bits, parts.zero_bias)


def _awq_columns(entry: TensorEntry, read: ReadBlock, stored_rows: range, outputs: range) -> Tensor:
    """Return codes [stored rows, outputs]."""
    words = range(outputs.start // 8, -(-outputs.stop // 8))
    codes = _split(read(entry, stored_rows, words), 4, dim=1)
    places = torch.tensor([AWQ_ORDER.index(output) for output in range(8)], device=codes.device)
    codes = codes.view(len(codes), -1, 8)[:, :, places].flatten(1)
    skip = outputs.start - words.start * 8
    return codes[:, skip : skip + len(outputs)]


def _split(words: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes of int32 words [R, C]: P times as many along ``dim``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    if dim == 0:
        return ((words[:, None] >> shifts[None, :, None]) & ((1 << bits) - 1)).flatten(0, 1)
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _signed(codes: Tensor, bits: int, bias: int = 0) -> Tensor:
    """Move codes of 4 or 8 bits down by half of their range. With a bias of 1 they may be one more than int8 holds."""
    return (codes + (bias - (1 << (bits - 1)))).to(torch.int16 if bias else torch.int8)
