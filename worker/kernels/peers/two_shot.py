# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Sums over the ranks of a stage in two shots: rank j adds up the j-th part of the columns and sends the sum to all.

Two ways over the link instead of one, but fewer bytes from three ranks on. Otherwise like `all_reduce`.
"""

# T tokens, D model dim

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.peers.all_reduce import LEAST_BLOCK, Residual, finish, load_stream, num_warps, stream_and_norm
from mgpu.worker.kernels.peers.memory import Area, AreaShape, PeerAlarm, empty_bits
from mgpu.worker.kernels.peers.messages import BITS, TIMED, clean_bits, receive, send
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs


@triton.jit(do_not_specialize=["rank", "timeout_us"])
def _two_shot_kernel(
    x_ptr, residual_ptr, bias_ptr, weight_ptr, out_ptr, scale_ptr,
    parts_ptr, part_peers, sums_ptr, sum_peers, turns_ptr, failed_ptr, seen_ptr,
    x_stride, residual_stride, out_stride, rank, timeout_us, eps,
    D: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, PART_BLOCK: tl.constexpr,
    BITS: tl.constexpr, EMPTY: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    c = tl.arange(0, PART_BLOCK)
    mask = d < D
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    turn = tl.load(turns_ptr + row)
    line = turn * ROWS + row
    for peer in tl.static_range(RANKS):
        inside = (c < PART) & (peer * PART + c < D)
        x = tl.load(x_ptr + row * x_stride + peer * PART + c, mask=inside, other=0.0)
        send(part_peers[peer], (line * RANKS + rank) * PART + c, clean_bits(x, BITS, EMPTY), inside, BITS)
    stream = load_stream(residual_ptr, row, residual_stride, d, mask)
    source = tl.arange(0, PADDED)[:, None]
    mine = (c < PART) & (rank * PART + c < D)
    places = parts_ptr + (line * RANKS + source) * PART + c[None, :]
    bits = receive(places, (source < RANKS) & mine[None, :], failed_ptr, seen_ptr, timeout_us, EMPTY, TIMED)
    dtype = x_ptr.dtype.element_ty
    part = tl.sum(bits.to(dtype, bitcast=True).to(tl.float32), 0).to(dtype)
    own = clean_bits(part, BITS, EMPTY)
    for peer in tl.static_range(RANKS):
        send(sum_peers[peer], line * D + rank * PART + c, own, mine, BITS)
    bits = receive(sums_ptr + line * D + d[None, :], mask[None, :], failed_ptr, seen_ptr, timeout_us, EMPTY, TIMED)
    total = tl.sum(bits.to(dtype, bitcast=True).to(tl.float32), 0)
    finish(
        total, stream, row, d, mask, dtype, residual_ptr, residual_stride, bias_ptr, weight,
        out_ptr, scale_ptr, out_stride, eps, D, BLOCK,
    )  # fmt: skip
    tl.store(turns_ptr + row, 1 - turn)


@dataclass(frozen=True, slots=True)
class TwoShot:
    """Two-shot sums of up to ``rows`` rows of ``dim``; all ranks are made with the same numbers."""

    parts: Area
    sums: Area
    alarm: PeerAlarm
    rank: int
    rows: int
    dim: int

    @staticmethod
    def shapes(ranks: int, rows: int, dim: int, dtype: torch.dtype) -> list[AreaShape]:
        """Return the areas that it needs: parts to be summed, then sums."""
        columns = ranks * part_columns(ranks, dim, dtype)
        return [AreaShape(dtype, rows * columns, rows), AreaShape(dtype, rows * dim, rows)]

    def __call__(
        self,
        x_TD: Tensor,
        out_TD: Tensor,
        residual: Residual | None,
        bias_D: Tensor | None,
        scale_T: Tensor | None = None,
    ) -> Tensor:
        """Add up over the ranks into ``out``, which may be ``x``. With a residual, ``out`` is its norm.

        With ``scale_T`` the norm is quantized, as by `OneShot`.
        """
        ranks, device = len(self.parts.peers), x_TD.device
        part = part_columns(ranks, self.dim, x_TD.dtype)
        blocks = [max(LEAST_BLOCK, power_of_2(columns)) for columns in (self.dim, part)]
        stream_TD, weight_D, stream_stride, eps = stream_and_norm(residual)
        _two_shot_kernel[(x_TD.shape[0],)](
            x_TD, stream_TD, bias_D, weight_D, out_TD, scale_T,
            self.parts.inbox, self.parts.peers, self.sums.inbox, self.sums.peers, self.parts.turns,
            self.alarm.failed, self.alarm.seen,
            x_TD.stride(0), stream_stride, out_TD.stride(0), self.rank, self.alarm.timeout_us, eps,
            self.dim, part, self.rows, ranks, power_of_2(ranks), *blocks,
            BITS[self.parts.inbox.dtype], empty_bits(x_TD.dtype), TIMED, overlaps_launches(device),
            **launch_options(device, num_warps(*blocks)),
        )  # fmt: skip
        return out_TD


def part_columns(ranks: int, dim: int, dtype: torch.dtype) -> int:
    """Return how many columns one rank adds up, in whole 16 bytes; the last rank may have fewer."""
    line = 16 // dtype.itemsize
    return -(-dim // (ranks * line)) * line


def two_shot_divides(ranks: int, dim: int, dtype: torch.dtype) -> bool:
    """Return whether every rank has a part: a rank without one could not tell when its peers are done."""
    return (ranks - 1) * part_columns(ranks, dim, dtype) < dim
