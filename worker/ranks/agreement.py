"""Let all ranks of a group use a way to talk, or none: they tell each other how they are doing, and leave in order.

Every rank makes the same calls in the same order, also one that has a problem, since each call waits for all ranks.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgpack
import torch
from torch import Tensor

from mgpu.worker.errors import PeerLost
from mgpu.worker.ranks.collectives import TensorParallelGroup

_MESSAGE_BYTES = 1024
_MOST_TEXT = 300


class CannotUse(Exception):
    """Some rank cannot use what is being opened; the text says why."""


@dataclass(frozen=True, slots=True)
class RankStatus:
    """What a rank says of itself."""

    problem: str
    machine: str
    gpu: str
    """UUID; empty on the CPU."""
    index: int
    """The GPU's index in that process."""
    handle: bytes
    """Of the memory that the rank shares."""
    unreachable: tuple[int, ...]
    """Ranks whose memory it cannot map."""


def exchange(
    group: TensorParallelGroup,
    device: torch.device,
    problem: str,
    handle: bytes = b"",
    unreachable: tuple[int, ...] = (),
) -> list[RankStatus]:
    """Tell all ranks how this one is doing; return what they say, by rank. PeerLost when a rank is gone."""
    fields = [problem[:_MOST_TEXT], this_machine(), gpu_of(device), device.index or 0, handle, list(unreachable)]
    packed = msgpack.packb(fields)
    if len(packed) > _MESSAGE_BYTES:
        packed = msgpack.packb([f"a handle of {len(handle)} bytes", "", "", 0, b"", []])
    mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    mine[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    return [_unpack(each) for each in group.all_gather(mine).view(-1, _MESSAGE_BYTES)]


def leave_in_order(group: TensorParallelGroup, device: torch.device, unmap: Callable[[], None]) -> None:
    """Call ``unmap`` when no rank writes any more; return when no rank has this one's memory mapped."""
    with suppress(PeerLost, RuntimeError):
        torch.cuda.synchronize(device)
        group.all_gather(torch.zeros(1, dtype=torch.uint8))
    unmap()
    with suppress(PeerLost, RuntimeError):
        group.all_gather(torch.zeros(1, dtype=torch.uint8))


def this_machine() -> str:
    """Return a name of this machine that no other has, until it boots again."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def gpu_of(device: torch.device) -> str:
    """Return the UUID of a GPU, which is the same in all processes; empty on the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _unpack(message: Tensor) -> RankStatus:
    unpacker = msgpack.Unpacker()
    unpacker.feed(bytes(message.tolist()))
    problem, machine, gpu, index, handle, unreachable = unpacker.unpack()
    return RankStatus(problem, machine, gpu, index, handle, tuple(unreachable))
