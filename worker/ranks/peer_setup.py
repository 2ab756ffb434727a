"""Open a `PeerGroup`: allocate, exchange handles, map, try. All ranks use it, or none does.

Every step ends with all ranks telling each other how it went, through the group that they have already. So a rank whose
GPU cannot be reached, or whose kernels give wrong sums, makes all of them keep to that group.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgpack
import torch
from torch import Tensor

from mgpu.worker.errors import PeerLost
from mgpu.worker.kernels.peers.memory import AreaShape, PeerAlarm, buffer_bytes, cut
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.ranks.cuda_ipc import export, map_exported
from mgpu.worker.ranks.peer_check import peer_problem
from mgpu.worker.ranks.peer_group import PeerGroup, ReduceLimits, area_shapes

SWITCH = "MGPU_PEER_REDUCE"
"""0: never; 1: also where ranks share a GPU, which takes turns with kernels that wait, so for tests only."""
_MESSAGE_BYTES = 1024
_MOST_TEXT = 300
_CHECK_S = 30.0
"""Longest wait of a kernel while the group is tried: the ranks compile the same kernels, not equally fast."""


class _NoPeers(Exception):
    """Some rank cannot; the text says why."""


class PeerSetup:
    """The way to a group, and what it owns: this rank's buffer and the mappings of the others'."""

    def __init__(self, group: TensorParallelGroup, talk: TensorParallelGroup, device: torch.device) -> None:
        """Prepare; ``group`` adds up what kernels do not, ``talk`` is the same ranks on CPU tensors."""
        self._group = group
        self._talk = talk
        self._device = device
        self._mine: Tensor | None = None
        self._mapped: list[Tensor] = []
        self.note = ""
        """A line for the start-up log: what is used, or why not."""

    def open(self, limits: ReduceLimits, timeout_s: float) -> TensorParallelGroup:
        """Give a `PeerGroup`, or the group as it was where any rank cannot have one. PeerLost when a rank is gone."""
        try:
            opened = self._open(limits, timeout_s)
        except _NoPeers as reason:
            self._mapped, self._mine = [], None
            self.note = f"partial sums do not go by own kernels: {reason}"
            return self._group
        self.note = f"partial sums of up to {opened.most_rows} tokens go by own kernels over peer memory"
        return opened

    def _open(self, limits: ReduceLimits, timeout_s: float) -> PeerGroup:
        problem = refusal(limits, self._device)
        shapes = [] if problem else area_shapes(limits)
        areas = cut(*self._share_memory(shapes, problem), shapes)
        torch.cuda.synchronize(self._device)
        self._tell("")  # nobody writes before all areas are empty
        alarm = new_alarm(self._device, min(timeout_s, _CHECK_S))
        self._tell(peer_problem(PeerGroup(self._group, areas, alarm, limits), self._device))
        patient = PeerAlarm(alarm.failed, alarm.seen, int(timeout_s * 1e6))
        return PeerGroup(self._group, areas, patient, limits)

    def _share_memory(self, shapes: list[AreaShape], problem: str) -> tuple[Tensor, list[int]]:
        """Give this rank's buffer, and where each rank's begins as this process sees it."""
        handle = b""
        if not problem:
            try:
                self._mine = torch.empty(buffer_bytes(shapes), dtype=torch.uint8, device=self._device)
                handle = export(self._mine)
            except RuntimeError as error:  # CUDA's, out of memory included: a server without these kernels still works
                problem = f"memory cannot be shared: {str(error).splitlines()[0]}"
        peers = self._tell(problem, handle)
        assert self._mine is not None
        addresses, problem = [], ""
        for rank, peer in enumerate(peers):
            try:
                addresses.append(self._mine.data_ptr() if rank == self._group.rank else self._map(peer))
            except (_NoPeers, RuntimeError) as error:
                problem = problem or f"rank {rank}'s memory cannot be mapped: {str(error).splitlines()[0]}"
        self._tell(problem)
        return self._mine, addresses

    def _map(self, peer: list[object]) -> int:
        _, machine, gpu, index, handle = cast(tuple[str, str, str, int, bytes], peer)
        if machine != _machine():
            raise _NoPeers("it is on another machine")
        if gpu == _gpu(self._device) and os.environ.get(SWITCH) != "1":
            raise _NoPeers("it shares this GPU")
        is_other = gpu != _gpu(self._device) and index != self._device.index and index < torch.cuda.device_count()
        if is_other and not torch.cuda.can_device_access_peer(self._device, index):
            raise _NoPeers(f"no peer access between GPUs {self._device.index} and {index}")
        self._mapped.append(map_exported(handle, self._device))
        return self._mapped[-1].data_ptr()

    def _tell(self, problem: str, handle: bytes = b"") -> list[list[object]]:
        """Tell all ranks how this one is doing and hear of the others; _NoPeers when one of them cannot."""
        packed = msgpack.packb([problem[:_MOST_TEXT], _machine(), _gpu(self._device), self._device.index or 0, handle])
        if len(packed) > _MESSAGE_BYTES:
            packed = msgpack.packb([f"a handle of {len(handle)} bytes", "", "", 0, b""])
        mine = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        mine[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        messages = [_unpack(each) for each in self._talk.all_gather(mine).view(-1, _MESSAGE_BYTES)]
        for rank, message in enumerate(messages):
            if message[0]:
                raise _NoPeers(f"rank {rank} of {len(messages)}: {message[0]}")
        return messages

    def close(self) -> None:
        """Part in good order: unmap when no rank writes any more, free when no rank has this buffer mapped."""
        if self._mine is None:
            return
        with suppress(PeerLost, RuntimeError):
            torch.cuda.synchronize(self._device)
            self._talk.all_gather(torch.zeros(1, dtype=torch.uint8))
        self._mapped = []
        with suppress(PeerLost, RuntimeError):
            self._talk.all_gather(torch.zeros(1, dtype=torch.uint8))
        self._mine = None


def refusal(limits: ReduceLimits, device: torch.device) -> str:
    """Say why this rank does not even try; empty when it does."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if os.environ.get("MGPU_NO_P2P") == "1":
        return "MGPU_NO_P2P=1"
    if not uses_kernels(device):
        return "kernels are not used"
    if limits.dim * limits.dtype.itemsize % 16:
        return f"a row of {limits.dim} values is not a multiple of 16 bytes"
    return ""


def new_alarm(device: torch.device, timeout_s: float) -> PeerAlarm:
    """Make an alarm of a GPU's kernels."""
    failed = torch.zeros(1, dtype=torch.int32, device=device)
    return PeerAlarm(failed, torch.zeros(1, dtype=torch.int32, pin_memory=True), int(timeout_s * 1e6))


def _unpack(message: Tensor) -> list[object]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(bytes(message.tolist()))
    found = unpacker.unpack()
    assert isinstance(found, list)
    return found


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
