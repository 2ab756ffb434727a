"""Memory on each rank's GPU that the other ranks of a stage write to.

Every rank owns one buffer, cut into areas in the same way, and maps those of its peers. What lies in an area is nothing
yet where its bits are those of a minus zero (`EMPTY`): the data itself says that it has come, without flags and fences.
Who reads a place empties it again, and the two halves of each area take turns: a rank that writes to a half again has
heard from all peers in the turn between, so that they are done with what was there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
TURNS = 2


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """Give the integer type of the same width."""
    return torch.int32 if dtype.itemsize == 4 else torch.int16


def empty_bits(dtype: torch.dtype) -> int:
    """Give the bits of minus zero in a floating type, or the least integer: what never is sent."""
    return int(torch.iinfo(bits_of(dtype)).min)


@dataclass(frozen=True, slots=True)
class Area:
    """One kind of messages: where this rank's come in, and where it puts those to every peer."""

    inbox: Tensor
    """Integers as wide as the data, in this rank's memory."""
    peers: tuple[int, ...]
    """Address of the same area on each rank of the stage, this one included."""
    turns: Tensor
    """int32, per program of a kernel: which of the two halves is next. Kernels advance them, so that graphs replay."""


@dataclass(frozen=True, slots=True)
class AreaShape:
    """How much one area holds: ``count`` elements per turn, all ranks' messages together.

    ``programs``: most programs of a kernel that uses it.
    """

    dtype: torch.dtype
    count: int
    programs: int

    @property
    def nbytes(self) -> int:
        """Size of both turns, in whole lines."""
        return -(-TURNS * self.count * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class PeerAlarm:
    """How a kernel that waits for a peer in vain ends, and who is told."""

    failed: Tensor
    """int32 [1] on the GPU: kernels after the first that failed do not wait."""
    seen: Tensor
    """int32 [1] in pinned host memory, read without a copy."""
    timeout_us: int
    """Longest wait in microseconds; in the interpreter, which has no clock, number of looks."""


def buffer_bytes(shapes: Sequence[AreaShape]) -> int:
    """Give the size of a rank's buffer."""
    return sum(shape.nbytes for shape in shapes)


def cut(mine: Tensor, addresses: Sequence[int], shapes: Sequence[AreaShape]) -> list[Area]:
    """Cut this rank's buffer (uint8) into empty areas; ``addresses`` are where each rank's buffer begins, as mapped."""
    areas, offset = [], 0
    for shape in shapes:
        inbox = mine[offset : offset + TURNS * shape.count * shape.dtype.itemsize].view(bits_of(shape.dtype))
        inbox.fill_(empty_bits(shape.dtype))
        turns = torch.zeros(shape.programs, dtype=torch.int32, device=mine.device)
        areas.append(Area(inbox, tuple(address + offset for address in addresses), turns))
        offset += shape.nbytes
    return areas
