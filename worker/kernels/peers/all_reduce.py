# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Sums over the ranks of a stage in one shot, alone or with the residual add and RMSNorm that follow.

One program per row. Every rank sends its row to all ranks, and each adds them up: one way over the link. All ranks run
the same code over the same numbers, so that they get the same bits. `two_shot` is for larger messages.
"""

# T tokens, D model dim

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.layers.float8_quantize import store_words
from mgpu.worker.kernels.peers.memory import Area, AreaShape, PeerAlarm, empty_bits
from mgpu.worker.kernels.peers.messages import BITS, TIMED, clean_bits, receive, send
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs

LEAST_BLOCK = 128
"""A tile must not have fewer elements than a warp has threads (see `receive`), nor than 32 words of float8."""


@triton.jit
def load_stream(residual_ptr, row, residual_stride, d, mask):
    """Load a row of the residual stream, ahead of the wait; 0 without one."""
    stream = 0.0
    if residual_ptr is not None:
        stream = tl.load(residual_ptr + row * residual_stride + d, mask=mask, other=0.0).to(tl.float32)
    return stream


@triton.jit
def finish(
    total, stream, row, d, mask, dtype: tl.constexpr, residual_ptr, residual_stride, bias_ptr, weight,
    out_ptr, scale_ptr, out_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a row's sum; with a residual stream, add the sum to it and store the normalized stream.

    With ``scale_ptr`` the normalized stream is quantized for a float8 product: ``out_ptr`` takes words.
    """
    total = total.to(dtype).to(tl.float32)  # rounded as often as without fusion
    if bias_ptr is not None:
        total = (total + tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    if residual_ptr is not None:
        x = (stream + total).to(dtype)
        tl.store(residual_ptr + row * residual_stride + d, x, mask=mask)
        x = x.to(tl.float32)
        total = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    if scale_ptr is None:
        tl.store(out_ptr + row * out_stride + d, total.to(dtype), mask=mask)
    else:
        # The words of a row hold channels 32 apart: see `word_channels`.
        total = tl.where(mask, total, 0.0)
        parts = tl.permute(tl.reshape(total, (BLOCK // 128, 4, 32)), (0, 2, 1))
        store_words(tl.reshape(parts, (BLOCK // 4, 4)), out_ptr, scale_ptr, row, out_stride, BLOCK // 4)


@triton.jit(do_not_specialize=["rank", "timeout_us"])
def _one_shot_kernel(
    x_ptr, residual_ptr, bias_ptr, weight_ptr, out_ptr, scale_ptr, inbox_ptr, peers, turns_ptr, failed_ptr, seen_ptr,
    x_stride, residual_stride, out_stride, rank, timeout_us, eps,
    D: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    BITS: tl.constexpr, EMPTY: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    mask = d < D
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + d, mask=mask, other=0.0)
    turn = tl.load(turns_ptr + row)
    own = clean_bits(x, BITS, EMPTY)
    for peer in tl.static_range(RANKS):
        send(peers[peer], ((turn * RANKS + rank) * ROWS + row) * D + d, own, mask, BITS)
    stream = load_stream(residual_ptr, row, residual_stride, d, mask)
    source = tl.arange(0, PADDED)[:, None]
    places = inbox_ptr + ((turn * RANKS + source) * ROWS + row) * D + d[None, :]
    bits = receive(places, (source < RANKS) & mask[None, :], failed_ptr, seen_ptr, timeout_us, EMPTY, TIMED)
    total = tl.sum(bits.to(x.dtype, bitcast=True).to(tl.float32), 0)
    finish(
        total, stream, row, d, mask, x.dtype, residual_ptr, residual_stride, bias_ptr, weight,
        out_ptr, scale_ptr, out_stride, eps, D, BLOCK,
    )  # fmt: skip
    tl.store(turns_ptr + row, 1 - turn)


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream [T, D] that a sum is added to, in place, and the norm of the result."""

    stream_TD: Tensor
    weight_D: Tensor
    eps: float


def stream_and_norm(residual: Residual | None) -> tuple[Tensor | None, Tensor | None, int, float]:
    """Return a residual as arguments of a kernel: the stream, the norm's weight, the stream's stride, and eps."""
    if residual is None:
        return None, None, 0, 0.0
    return residual.stream_TD, residual.weight_D, residual.stream_TD.stride(0), residual.eps


@dataclass(frozen=True, slots=True)
class OneShot:
    """One-shot sums of up to ``rows`` rows of ``dim``; all ranks are made with the same numbers."""

    area: Area
    alarm: PeerAlarm
    rank: int
    rows: int
    dim: int

    @staticmethod
    def shapes(ranks: int, rows: int, dim: int, dtype: torch.dtype) -> list[AreaShape]:
        """Return the areas that it needs."""
        return [AreaShape(dtype, ranks * rows * dim, rows)]

    def __call__(
        self,
        x_TD: Tensor,
        out_TD: Tensor,
        residual: Residual | None,
        bias_D: Tensor | None,
        scale_T: Tensor | None = None,
    ) -> Tensor:
        """Add up over the ranks into ``out``, which may be ``x``. With a residual, ``out`` is its norm.

        With ``scale_T`` the norm is quantized: ``out`` and it are what `float8_quantize.empty_words` returns.
        """
        ranks, device = len(self.area.peers), x_TD.device
        block = max(LEAST_BLOCK, power_of_2(self.dim))
        stream_TD, weight_D, stream_stride, eps = stream_and_norm(residual)
        _one_shot_kernel[(x_TD.shape[0],)](
            x_TD, stream_TD, bias_D, weight_D, out_TD, scale_T,
            self.area.inbox, self.area.peers, self.area.turns, self.alarm.failed, self.alarm.seen,
            x_TD.stride(0), stream_stride, out_TD.stride(0), self.rank, self.alarm.timeout_us, eps,
            self.dim, self.rows, ranks, power_of_2(ranks), block,
            BITS[self.area.inbox.dtype], empty_bits(x_TD.dtype), TIMED, overlaps_launches(device),
            **launch_options(device, num_warps(block)),
        )  # fmt: skip
        return out_TD


def num_warps(*blocks: int) -> int:
    """Return warps with 16 bytes of bfloat16 per thread, but no more threads than the smallest tile has elements."""
    return max(1, min(16, max(blocks) // 256, min(blocks) // 32))
