# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""One-shot sums through pinned memory of the host, which all ranks map: for GPUs that do not reach each other's memory.

The protocol is that of `all_reduce`. Two things differ, since the bus is slow and carries both directions at once:

- A rank's own part stays on its GPU.
- A program has several rows, and writes the next one before it reads one. So some rows come in while others go out.
  With a program for each row, all rows would go out before the first could come in.
"""

# T tokens, D model dim

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.peers.all_reduce import LEAST_BLOCK, Residual, finish, load_stream, num_warps, stream_and_norm
from mgpu.worker.kernels.peers.memory import Area, PeerAlarm, empty_bits
from mgpu.worker.kernels.peers.messages import BITS, TIMED, clean_bits, receive, send
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs

MOST_PROGRAMS = 32
"""Rows on their way at once: measured with 64 rows of 4,096 values (docs/kernels.md)."""


@triton.jit
def _send_row(
    x_ptr, x_stride, peers, turns_ptr, row, d, mask, rank,
    D: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, BITS: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    bits = clean_bits(tl.load(x_ptr + row * x_stride + d, mask=mask, other=0.0), BITS, EMPTY)
    place = ((tl.load(turns_ptr + row) * RANKS + rank) * ROWS + row) * D + d
    for peer in tl.static_range(RANKS):
        if peer != rank:
            send(peers[peer], place, bits, mask, BITS)


@triton.jit(do_not_specialize=["T", "rank", "timeout_us"])
def _host_shot_kernel(
    x_ptr, residual_ptr, bias_ptr, weight_ptr, out_ptr, scale_ptr, inbox_ptr, peers, turns_ptr, failed_ptr, seen_ptr,
    T, x_stride, residual_stride, out_stride, rank, timeout_us, eps,
    D: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    BITS: tl.constexpr, EMPTY: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    step = tl.num_programs(0)
    d = tl.arange(0, BLOCK)
    mask = d < D
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    source = tl.arange(0, PADDED)[:, None]
    is_mine = (source == rank) & mask[None, :]
    arrives = (source < RANKS) & (source != rank) & mask[None, :]
    wait_for_inputs(OVERLAP)
    _send_row(x_ptr, x_stride, peers, turns_ptr, first, d, mask, rank, D, ROWS, RANKS, BITS, EMPTY)
    for row in range(first, T, step):
        following = row + step
        if following < T:
            _send_row(x_ptr, x_stride, peers, turns_ptr, following, d, mask, rank, D, ROWS, RANKS, BITS, EMPTY)
        x = tl.load(x_ptr + row * x_stride + d, mask=mask, other=0.0)
        stream = load_stream(residual_ptr, row, residual_stride, d, mask)
        turn = tl.load(turns_ptr + row)
        places = inbox_ptr + ((turn * RANKS + source) * ROWS + row) * D + d[None, :]
        bits = receive(places, arrives, failed_ptr, seen_ptr, timeout_us, EMPTY, TIMED)
        bits = tl.where(is_mine, clean_bits(x, BITS, EMPTY)[None, :], bits)
        total = tl.sum(bits.to(x.dtype, bitcast=True).to(tl.float32), 0)
        finish(
            total, stream, row, d, mask, x.dtype, residual_ptr, residual_stride, bias_ptr, weight,
            out_ptr, scale_ptr, out_stride, eps, D, BLOCK,
        )  # fmt: skip
        tl.store(turns_ptr + row, 1 - turn)


@dataclass(frozen=True, slots=True)
class HostShot:
    """As `OneShot`, in an area of the same shape."""

    area: Area
    alarm: PeerAlarm
    rank: int
    rows: int
    dim: int

    def __call__(
        self,
        x_TD: Tensor,
        out_TD: Tensor,
        residual: Residual | None,
        bias_D: Tensor | None,
        scale_T: Tensor | None = None,
    ) -> Tensor:
        """Add up as `OneShot` does."""
        ranks, device, rows = len(self.area.peers), x_TD.device, len(x_TD)
        block = max(LEAST_BLOCK, power_of_2(self.dim))
        stream_TD, weight_D, stream_stride, eps = stream_and_norm(residual)
        _host_shot_kernel[(min(rows, MOST_PROGRAMS),)](
            x_TD, stream_TD, bias_D, weight_D, out_TD, scale_T,
            self.area.inbox, self.area.peers, self.area.turns, self.alarm.failed, self.alarm.seen,
            rows, x_TD.stride(0), stream_stride, out_TD.stride(0), self.rank, self.alarm.timeout_us, eps,
            self.dim, self.rows, ranks, power_of_2(ranks), block,
            BITS[self.area.inbox.dtype], empty_bits(x_TD.dtype), TIMED, overlaps_launches(device),
            **launch_options(device, num_warps(block)),
        )  # fmt: skip
        return out_TD
