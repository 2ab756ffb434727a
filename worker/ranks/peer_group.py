"""A tensor-parallel group on GPUs: small sums by own kernels over peer or host memory, large ones by NCCL.

The kernels wait for peers on the device, so that a whole step can be a CUDA graph. A kernel cannot raise: when it has
waited too long it sets a flag in host memory, and `PeerGroup.check` raises PeerLost for it.
"""

# T tokens, D model dim, S rows that sample

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgpu.protocol.model.shared_memory_layout import SUM_ROWS, host_sum_rows
from mgpu.worker.errors import PeerLost
from mgpu.worker.kernels.peers.memory import Area, AreaShape, PeerAlarm
from mgpu.worker.quantization.float8_rows import Float8Rows
from mgpu.worker.ranks.collectives import AbsentRanks, DistGroup, MeasurableGroup, TensorParallelGroup

if TYPE_CHECKING:
    from mgpu.worker.kernels.peers.all_reduce import OneShot
    from mgpu.worker.kernels.peers.host_shot import HostShot
    from mgpu.worker.kernels.peers.two_shot import TwoShot

ONE_SHOT_BYTES = {2: 8 << 20, 3: 512 << 10, 4: 384 << 10, 5: 256 << 10, 6: 192 << 10, 7: 192 << 10, 8: 160 << 10}
"""Largest message of one shot by number of ranks. For 2 ranks measured on H100s (docs/kernels.md): nothing is faster up
to that size. For more ranks not measured with these kernels; the sizes are those where SGLang changes on H200s."""
MOST_ROWS = SUM_ROWS
"""Largest message of two shots, in rows. NCCL adds up larger ones."""
MOST_RANKS = max(ONE_SHOT_BYTES)


@dataclass(frozen=True, slots=True)
class ReduceLimits:
    """What kernels of ``ranks`` ranks add up: rows of ``dim`` values, in one shot or two up to so many rows."""

    ranks: int
    dim: int
    dtype: torch.dtype
    one_shot_rows: int
    two_shot_rows: int
    is_on_host: bool = False
    """Through host memory, in one shot only."""

    @staticmethod
    def of(ranks: int, dim: int, dtype: torch.dtype) -> "ReduceLimits":
        """Return the limits by message size."""
        one_shot_rows = max(1, min(MOST_ROWS, ONE_SHOT_BYTES[ranks] // (dim * dtype.itemsize)))
        return ReduceLimits(ranks, dim, dtype, one_shot_rows, MOST_ROWS)

    @staticmethod
    def through_host(ranks: int, dim: int, dtype: torch.dtype) -> "ReduceLimits":
        """Return the limits of sums through host memory, which has room for one shot only."""
        rows = host_sum_rows(ranks, dim, dtype.itemsize)
        return ReduceLimits(ranks, dim, dtype, rows, rows, is_on_host=True)

    @property
    def choices(self) -> int:
        """Most rows that tokens are chosen for."""
        return max(MOST_ROWS, self.two_shot_rows)


def area_shapes(limits: ReduceLimits) -> list[AreaShape]:
    """Return the areas that a `PeerGroup` needs on each rank: two more where two shots are possible."""
    from mgpu.worker.kernels.peers.all_reduce import OneShot
    from mgpu.worker.kernels.peers.exchange import Exchange
    from mgpu.worker.kernels.peers.two_shot import TwoShot, two_shot_divides

    shapes = Exchange.shapes(limits.ranks, limits.choices)
    shapes += OneShot.shapes(limits.ranks, limits.one_shot_rows, limits.dim, limits.dtype)
    if not limits.is_on_host and two_shot_divides(limits.ranks, limits.dim, limits.dtype):
        shapes += TwoShot.shapes(limits.ranks, limits.two_shot_rows, limits.dim, limits.dtype)
    return shapes


class PeerGroup:
    """Makes sums of up to `most_rows` rows of the model's width by kernels, everything else by ``inner``.

    The caller owns the memory behind ``areas``, which are cut as `area_shapes` says.
    """

    def __init__(
        self,
        inner: TensorParallelGroup,
        areas: Sequence[Area],
        alarm: PeerAlarm,
        limits: ReduceLimits,
        most_rows: int | None = None,
        in_float8: bool = False,
    ) -> None:
        """``most_rows``: let ``inner`` add up larger messages, although kernels could. ``in_float8``: norms within sums
        may be quantized, as a trial has shown."""
        from mgpu.worker.kernels.peers.all_reduce import OneShot
        from mgpu.worker.kernels.peers.exchange import Exchange
        from mgpu.worker.kernels.peers.host_shot import HostShot
        from mgpu.worker.kernels.peers.sent_product import SentProduct
        from mgpu.worker.kernels.peers.two_shot import TwoShot

        self.rank = inner.rank
        self.size = inner.size
        self.inner = inner
        self._alarm = alarm
        self.limits = limits
        self.in_float8 = in_float8
        pairs, one, *two = areas
        self.exchange = Exchange(pairs, alarm, self.rank, limits.choices)
        sizes = limits.one_shot_rows, limits.dim
        self.one_shot = (HostShot if limits.is_on_host else OneShot)(one, alarm, self.rank, *sizes)
        self._sent = SentProduct(self.one_shot) if isinstance(self.one_shot, OneShot) else None
        self._has_sent = False
        """True between a product that was sent and its sum."""
        self.two_shot = TwoShot(two[0], two[1], alarm, self.rank, limits.two_shot_rows, limits.dim) if two else None
        possible = limits.one_shot_rows if self.two_shot is None else limits.two_shot_rows
        self.most_rows = possible if most_rows is None else most_rows

    def takes(self, x: Tensor) -> bool:
        """Return True if kernels add this up."""
        return (
            x.dim() == 2
            and x.shape[1] == self.limits.dim
            and 0 < x.shape[0] <= self.most_rows
            and x.dtype is self.limits.dtype
            and x.stride(1) == 1
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            return self.inner.all_reduce(x)
        return self._kernel(x)(x, x, None, None)

    def all_gather(self, x: Tensor) -> Tensor:
        return self.inner.all_gather(x)

    def add_and_norm(
        self, residual_TD: Tensor, part_TD: Tensor, bias_D: Tensor | None, weight_D: Tensor, eps: float
    ) -> Tensor:
        """Add the sum of the ranks' parts, and a bias, to ``residual`` in place; return the normalized sum."""
        from mgpu.worker.kernels.peers.all_reduce import Residual

        residual = Residual(residual_TD, weight_D, eps)
        return self._kernel(part_TD)(part_TD, torch.empty_like(residual_TD), residual, bias_D)

    def add_and_norm_float8(
        self, residual_TD: Tensor, part_TD: Tensor, bias_D: Tensor | None, weight_D: Tensor, eps: float
    ) -> Float8Rows:
        """Like `add_and_norm`, with the result quantized for a float8 product."""
        from mgpu.worker.kernels.layers.float8_quantize import as_rows, empty_words
        from mgpu.worker.kernels.peers.all_reduce import Residual

        words, scale_T = empty_words(len(residual_TD), residual_TD.shape[1], residual_TD.device)
        self._kernel(part_TD)(part_TD, words, Residual(residual_TD, weight_D, eps), bias_D, scale_T)
        return as_rows(words, scale_T)

    def takes_product(self, x_TK: Tensor, w_NK: Tensor) -> bool:
        """Return True if `send_product` takes this product."""
        from mgpu.worker.kernels.peers.sent_product import takes_product

        if self._sent is None or self._has_sent or x_TK.dtype is not self.limits.dtype:
            return False
        return takes_product(x_TK, w_NK, self._sent.sums)

    def send_product(self, x_1K: Tensor, w_NK: Tensor) -> None:
        """Multiply this rank's part of one row by w^T and send it to all ranks. `add_sent` must follow."""
        assert self._sent is not None
        self._sent.send(x_1K, w_NK)
        self._has_sent = True

    def add_sent(self, bias_D: Tensor | None, device: torch.device) -> Tensor:
        """Return the sum of the products that the ranks have sent."""
        assert self._sent is not None
        self._has_sent = False
        out_1D = torch.empty((1, self.limits.dim), dtype=self.limits.dtype, device=device)
        return self._sent.add_up(out_1D, None, bias_D)

    def add_sent_and_norm(self, residual_1D: Tensor, bias_D: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        """Add the sum of what the ranks have sent to ``residual`` in place; return the normalized sum."""
        from mgpu.worker.kernels.peers.all_reduce import Residual

        assert self._sent is not None
        self._has_sent = False
        residual = Residual(residual_1D, weight_D, eps)
        return self._sent.add_up(torch.empty_like(residual_1D), residual, bias_D)

    def _kernel(self, x_TD: Tensor) -> "OneShot | HostShot | TwoShot":
        assert not self._has_sent, "a product that was sent is added up before any other sum"
        return self.one_shot if self.two_shot is None or x_TD.shape[0] <= self.one_shot.rows else self.two_shot

    @property
    def has_failed(self) -> bool:
        """True if a kernel has waited for a peer in vain. All results since then are worthless."""
        return bool(self._alarm.seen)

    def check(self) -> None:
        """Raise PeerLost if a kernel has waited in vain."""
        if self.has_failed:
            raise PeerLost(f"rank {self.rank} of {self.size} waited for a sum of its peers in vain")


def peers_of(group: TensorParallelGroup) -> PeerGroup | None:
    """Return the `PeerGroup` in the stack of ``group``; None if it has none, or while the rank works alone."""
    if isinstance(group, MeasurableGroup):
        return None if group.alone else peers_of(group.inner)
    return group if isinstance(group, PeerGroup) else None


def captured_rows(group: TensorParallelGroup) -> int:
    """Return the most rows that a CUDA graph of this group can add up; 0 if its sums cannot be captured at all."""
    if isinstance(group, MeasurableGroup):
        return captured_rows(group.inner)
    if isinstance(group, PeerGroup):
        return max(group.most_rows, captured_rows(group.inner))
    is_absent = isinstance(group, AbsentRanks)  # they will do what they can
    if group.size == 1 or is_absent or (isinstance(group, DistGroup) and group.is_capturable):
        return sys.maxsize
    return 0
