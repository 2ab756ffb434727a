"""Reduce and gather over memory that all ranks of one machine map.

A rank publishes data by storing it and then storing a counter, and readers poll the counter. Plain stores keep this
order on x86-64 only (no store passes a store, no load passes a load), so other machines are refused.
"""

import mmap
import os
import platform
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mgpu.protocol.model.shared_memory_layout import LINE, ReduceRegion, SharedLayout, orders_stores
from mgpu.worker.errors import PeerLost

WORD = 8
"""Bytes of a counter."""
_QUICK_POLLS = 200
_LONGEST_NAP_S = 0.0005


class SharedSegment:
    """This process's mapping of the shared file: `words` are its 64-bit counters, `data` its bytes as a tensor.

    It owns the mapping, not the file descriptor.
    """

    def __init__(self, fd: int, layout: SharedLayout, rank: int, timeout_s: float) -> None:
        if not orders_stores():
            raise RuntimeError(
                f"shared-memory transport needs x86-64's store order, not {platform.machine()}; use gloo"
            )
        self._map = mmap.mmap(fd, layout.total_bytes)
        self.words = memoryview(self._map).cast("Q")
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)
        self.rank = rank
        self.timeout_s = timeout_s
        self._failed = layout.failed // WORD
        self._barrier = layout.barrier // WORD
        self._barriers_passed = 0

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return ``count`` elements of ``dtype`` at a byte offset, without a copy."""
        return self.data[offset : offset + count * dtype.itemsize].view(dtype)

    def report_failure(self) -> None:
        """Tell all ranks that this one failed; their waits then end with `PeerLost` at once. The first report stays."""
        if self.words[self._failed] == 0:
            self.words[self._failed] = self.rank + 1

    def wait(self, word: int, target: int, peer: str, spin_s: float, timeout_s: float | None = None) -> None:
        """Return when ``words[word]`` reaches ``target``: poll for ``spin_s``, yielding the core, then also sleep."""
        words = self.words
        for _ in range(_QUICK_POLLS):
            if words[word] >= target:
                return
            os.sched_yield()
        began = time.monotonic()
        while words[word] < target:
            waited = time.monotonic() - began
            if waited < spin_s:
                os.sched_yield()
                continue
            self._check_peers(waited, timeout_s or self.timeout_s, peer)
            time.sleep(min(waited / 20, _LONGEST_NAP_S))

    def _check_peers(self, waited_s: float, timeout_s: float, peer: str) -> None:
        failed = self.words[self._failed]
        if failed:
            raise PeerLost(f"rank {failed - 1} failed while rank {self.rank} waited for {peer}")
        if waited_s > timeout_s:
            raise PeerLost(f"rank {self.rank} waited {timeout_s:g} s for {peer} in vain")

    def barrier(self, world_size: int, timeout_s: float) -> None:
        """Wait until all ranks of the plan have called this as often as this one."""
        self._barriers_passed += 1
        step = LINE // WORD
        self.words[self._barrier + self.rank * step] = self._barriers_passed
        for peer in range(world_size):
            self.wait(self._barrier + peer * step, self._barriers_passed, f"rank {peer} to start", 0.0, timeout_s)


class SharedMemoryGroup:
    """Tensor-parallel group on CPU tensors in shared memory.

    Operations use two sets of slots in turn. So a slot is written again only two operations later. By then all ranks
    have begun the operation in between, so they have finished reading it.
    """

    def __init__(self, segment: SharedSegment, region: ReduceRegion, rank: int, ranks: Sequence[int]) -> None:
        self.rank = rank
        self.size = region.size
        self._segment = segment
        self._region = region
        step = LINE // WORD
        self._mine = region.counters // WORD + rank * step
        self._peers = [
            (region.counters // WORD + peer * step, f"rank {ranks[peer]} in a collective")
            for peer in range(region.size)
            if peer != rank
        ]
        self._sequence = 0
        self._turn = 0
        self._slots: dict[tuple[int, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add in the order of ranks, in fp32, so that all ranks get the same bits; in place if contiguous."""
        x = x.contiguous()
        flat = x.view(-1)
        limit = self._region.slot_bytes // x.dtype.itemsize
        for start in range(0, flat.numel(), limit):
            self._reduce_piece(flat[start : start + limit] if flat.numel() > limit else flat)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        flat = x.contiguous().view(-1)
        limit = self._region.slot_bytes // x.dtype.itemsize
        out = torch.empty((self.size, flat.numel()), dtype=x.dtype)
        for start in range(0, flat.numel(), limit):
            piece = flat[start : start + limit]
            for peer, slot in enumerate(self._exchange(piece)):
                out[peer, start : start + limit] = slot
        return out.view(self.size, *x.shape).movedim(0, -2).reshape(*x.shape[:-1], -1)

    def _reduce_piece(self, flat: Tensor) -> None:
        slots = self._exchange(flat)
        if flat.dtype is torch.float32:
            torch.add(slots[0], slots[1], out=flat)
            for slot in slots[2:]:
                flat.add_(slot)
            return
        total = slots[0].float()
        for slot in slots[1:]:
            total += slot
        flat.copy_(total)

    def _exchange(self, piece: Tensor) -> list[Tensor]:
        """Publish this rank's piece and wait for the others'; the result is valid until the next call but one."""
        self._turn ^= 1
        slots = self._slots_of(piece.numel(), piece.dtype)[self._turn]
        slots[self.rank].copy_(piece)
        self._sequence += 1
        words, target = self._segment.words, self._sequence
        words[self._mine] = target
        for word, peer in self._peers:
            if words[word] < target:
                self._segment.wait(word, target, peer, spin_s=0.002)
        return slots

    def _slots_of(self, count: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Return the slots of both turns, cut to ``count`` elements. Kept, because decoding asks for the same ones."""
        found = self._slots.get((count, dtype))
        if found is None:
            if len(self._slots) > 256:
                self._slots.clear()
            found = (self._cut_slots(0, count, dtype), self._cut_slots(1, count, dtype))
            self._slots[(count, dtype)] = found
        return found

    def _cut_slots(self, turn: int, count: int, dtype: torch.dtype) -> list[Tensor]:
        base, step = self._region.slots, self._region.slot_bytes
        return [self._segment.view(base + (turn * self.size + r) * step, count, dtype) for r in range(self.size)]
