"""Memory on each rank's GPU that the other ranks of a stage write to, and the protocol that makes this safe.

Every rank owns one buffer, cut into areas in the same way, and maps the buffers of its peers. Where GPUs cannot reach
each other's memory, the buffers are pinned memory of the host, and the rest is the same. An area has a slot for
every element of one kind of message from every rank, and all of that twice: two halves.

- **Empty slots.** A slot that holds the bits of -0.0 is empty. Writers never send -0.0 (they send 0.0 instead), so any
  other value means that the data has arrived, and no flag or fence is needed. A reader empties what it has read.
- **Two halves.** Successive messages alternate between them. A rank that writes to a half again has received a message
  from every peer in between. A peer sends that one only after the kernel that read and emptied the half before has
  ended, so nothing unread is overwritten. Every message must therefore come from every rank to every rank.

Worked example: ranks A and B add up one number, so that each has the slots [half][sender].

1. A sends 3.0 into [0][A] of both buffers, B sends 0.0 (its number is -0.0) into [0][B] of both. Rank A finds 3.0 and
   -0.0, waits until B's 0.0 has arrived, adds up, and stores -0.0 into its two slots of half 0. So does B.
2. The next sum uses half 1. B's number reaches A only after B has emptied its half 0.
3. The third sum uses half 0 again: A may write there, because it has received B's number of the second sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
HALVES = 2


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """Return the integer type of the same width."""
    return torch.int32 if dtype.itemsize == 4 else torch.int16


def empty_bits(dtype: torch.dtype) -> int:
    """Return the bits of an empty slot: -0.0 in a floating type, which are those of the least integer."""
    return int(torch.iinfo(bits_of(dtype)).min)


@dataclass(frozen=True, slots=True)
class Area:
    """The slots of one kind of message: those of this rank, and the addresses of those of every rank."""

    inbox: Tensor
    """Integers as wide as the data, in this rank's memory."""
    peers: tuple[int, ...]
    """Address of the same area on each rank of the stage, this one included."""
    turns: Tensor
    """int32, per program of a kernel: the half that is next. Kernels advance it, so that a graph can be replayed."""


@dataclass(frozen=True, slots=True)
class AreaShape:
    """How much one area holds."""

    dtype: torch.dtype
    count: int
    """Elements per half, the messages of all ranks together."""
    programs: int
    """Most programs of a kernel that uses the area."""

    @property
    def nbytes(self) -> int:
        """Size of both halves, in whole lines."""
        return -(-HALVES * self.count * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class PeerAlarm:
    """Set by a kernel that has waited for a peer for too long."""

    failed: Tensor
    """int32 [1] on the GPU: kernels after the first failure do not wait."""
    seen: Tensor
    """int32 [1] in pinned host memory: the worker reads it without a copy."""
    timeout_us: int
    """Longest wait in microseconds; in the interpreter, which has no clock, number of looks."""


def buffer_bytes(shapes: Sequence[AreaShape]) -> int:
    """Return the size of a rank's buffer."""
    return sum(shape.nbytes for shape in shapes)


def cut(
    mine: Tensor, addresses: Sequence[int], shapes: Sequence[AreaShape], device: torch.device | None = None
) -> list[Area]:
    """Cut this rank's buffer (uint8) into empty areas; ``addresses`` are where each rank's buffer begins, as mapped.

    ``device``: whose kernels use the areas, if the buffer is pinned memory of the host.
    """
    areas, offset = [], 0
    for shape in shapes:
        inbox = mine[offset : offset + HALVES * shape.count * shape.dtype.itemsize].view(bits_of(shape.dtype))
        inbox.fill_(empty_bits(shape.dtype))
        turns = torch.zeros(shape.programs, dtype=torch.int32, device=device or mine.device)
        areas.append(Area(inbox, tuple(address + offset for address in addresses), turns))
        offset += shape.nbytes
    return areas
