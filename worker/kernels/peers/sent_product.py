# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""The product of one row, sent to all ranks as it is computed, and the sum of what the ranks have sent.

A program of the product writes its few outputs to every rank at once. So no kernel has to wait for the whole product,
read it again and send it: of the time between two products that is about a third. Bits are those of `gemv` and
`all_reduce`, whose area they use: a product is sent and added up before any other sum begins.

The sum starts while the product runs, and waits for numbers only, not for the end of the product:

- It reads the turn, and the residual stream, which the last kernel but one may have written. A product lets it start
  only once its own wait is over, so all kernels before the product have ended, and their writes are in the L2 cache.
  The sum's reads pass over the multiprocessor's own cache, where older values may be.
- It writes memory that the product read. Every program of the product of this rank has read all its inputs when its
  outputs are here, and the sum writes nothing before all outputs of all ranks are.
- The kernel after it waits for the end of the sum, which is after all outputs of the product.
"""

# N output channels (the model dim), K input channels

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.peers.all_reduce import LEAST_BLOCK, OneShot, Residual, finish, num_warps, stream_and_norm
from mgpu.worker.kernels.peers.memory import empty_bits
from mgpu.worker.kernels.peers.messages import BITS, TIMED, clean_bits, receive, send
from mgpu.worker.kernels.products.gemv import choose_tiling, load_weights, multiply_rows, weight_rows
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2


@triton.jit(do_not_specialize=["rank"])
def _send_product_kernel(
    x_ptr, w_ptr, peers, turns_ptr, N, K, rank,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    BITS: tl.constexpr, EMPTY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    rows = weight_rows(N, 0, BLOCK_N)
    w = load_weights(w_ptr, rows, tl.arange(0, BLOCK_K), K, EVEN_K)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not sooner: see above
    turn = tl.load(turns_ptr)
    y = multiply_rows(w, x_ptr, w_ptr, rows, K, BLOCK_N, BLOCK_K, EVEN_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bits = clean_bits(y.to(x_ptr.dtype.element_ty), BITS, EMPTY)
    for peer in tl.static_range(RANKS):
        send(peers[peer], (turn * RANKS + rank) * ROWS * N + n, bits, n < N, BITS)


@triton.jit(do_not_specialize=["timeout_us"])
def _add_sent_kernel(
    residual_ptr, bias_ptr, weight_ptr, out_ptr, scale_ptr, inbox_ptr, turns_ptr, failed_ptr, seen_ptr,
    residual_stride, out_stride, timeout_us, eps,
    D: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    EMPTY: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    dtype = out_ptr.dtype.element_ty
    if residual_ptr is not None:
        dtype = residual_ptr.dtype.element_ty  # the output may be quantized
    d = tl.arange(0, BLOCK)
    mask = d < D
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    turn = tl.load(turns_ptr, volatile=True)
    stream = 0.0
    if residual_ptr is not None:
        stream = tl.load(residual_ptr + d, mask=mask, other=0.0, volatile=True).to(tl.float32)
    source = tl.arange(0, PADDED)[:, None]
    places = inbox_ptr + (turn * RANKS + source) * ROWS * D + d[None, :]
    bits = receive(places, (source < RANKS) & mask[None, :], failed_ptr, seen_ptr, timeout_us, EMPTY, TIMED)
    total = tl.sum(bits.to(dtype, bitcast=True).to(tl.float32), 0)
    finish(
        total, stream, 0, d, mask, dtype, residual_ptr, residual_stride, bias_ptr, weight,
        out_ptr, scale_ptr, out_stride, eps, D, BLOCK,
    )  # fmt: skip
    tl.store(turns_ptr, 1 - turn)


@dataclass(frozen=True, slots=True)
class SentProduct:
    """Products of one row that are sent and added up through the area of a `OneShot` in peer memory."""

    sums: OneShot

    def send(self, x_1K: Tensor, w_NK: Tensor) -> None:
        """Multiply one row by w^T and send it to all ranks; `add_up` must follow before any other sum."""
        area, device, (n, k) = self.sums.area, x_1K.device, w_NK.shape
        tiling = choose_tiling(n, k, gated=False)
        block_k = min(tiling.block_k, power_of_2(k))
        _send_product_kernel[(ceil_div(n, tiling.block_n),)](
            x_1K, w_NK, area.peers, area.turns, n, k, self.sums.rank,
            self.sums.rows, len(area.peers), tiling.block_n, block_k, k % block_k == 0,
            BITS[area.inbox.dtype], empty_bits(x_1K.dtype), overlaps_launches(device),
            **launch_options(device, tiling.num_warps, 1),
        )  # fmt: skip

    def add_up(
        self, out_1D: Tensor, residual: Residual | None, bias_D: Tensor | None, scale_T: Tensor | None = None
    ) -> Tensor:
        """Add up what the ranks have sent into ``out``, with what follows as in `OneShot`."""
        sums, area, device = self.sums, self.sums.area, out_1D.device
        block, ranks = max(LEAST_BLOCK, power_of_2(sums.dim)), len(area.peers)
        stream_1D, weight_D, stream_stride, eps = stream_and_norm(residual)
        _add_sent_kernel[(1,)](
            stream_1D, bias_D, weight_D, out_1D, scale_T,
            area.inbox, area.turns, sums.alarm.failed, sums.alarm.seen,
            stream_stride, out_1D.stride(0), sums.alarm.timeout_us, eps,
            sums.dim, sums.rows, ranks, power_of_2(ranks), block,
            int(torch.iinfo(area.inbox.dtype).min), TIMED, overlaps_launches(device),
            **launch_options(device, num_warps(block)),
        )  # fmt: skip
        return out_1D


MOST_RANKS = 2
"""More were not measured: every program writes to each of them."""


def takes_product(x_TK: Tensor, w_NK: Tensor, sums: OneShot) -> bool:
    """Return True for products of one row whose outputs ``sums`` adds up in peer memory."""
    is_one_row = len(x_TK) == 1 and x_TK.stride(1) == 1 and w_NK.is_contiguous()
    is_few = len(sums.area.peers) <= MOST_RANKS
    return is_few and is_one_row and x_TK.dtype is w_NK.dtype and len(w_NK) == sums.dim
