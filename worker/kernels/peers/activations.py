# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Pass activations from one stage to the next, on the device: no host waits for either side.

Slots are empty or full by themselves, as `memory` explains, but a message goes one way only, so no answer tells the
sender that a slot has been read. The pace of the orchestrator does: it publishes step n only after the result of step
n - S - 1 (S stages), and that result proves that every stage has read and emptied what it was sent for that step. An
inbox with at least S + 1 places per row (`InboxShape.depth`) is therefore never overwritten too early.

Worked example: two stages, depth 4. Steps 1, 2 and 3 may be in flight at once and use the places 0, 1 and 2 of row 0.
Step 5 uses place 0 again. It is published after the result of step 2, and so after step 1's place was emptied.

Sender and receiver count the messages of each row separately, in `turns`. A step of 3 rows uses the first 3 rows only,
so a step may be a CUDA graph on one side and not on the other.
"""

# T tokens, D model dim

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.peers.all_reduce import LEAST_BLOCK, num_warps
from mgpu.worker.kernels.peers.memory import PeerAlarm, bits_of, empty_bits
from mgpu.worker.kernels.peers.messages import BITS, TIMED, clean_bits, receive, send
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs


@triton.jit
def _is_active(row, count_ptr):
    active = row >= 0
    if count_ptr is not None:
        active = row < tl.load(count_ptr)
    return active


@triton.jit
def _send_kernel(
    x_ptr, count_ptr, inboxes, turns_ptr, x_stride,
    D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, RECEIVERS: tl.constexpr, BLOCK: tl.constexpr,
    BITS: tl.constexpr, EMPTY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    active = _is_active(row, count_ptr)
    mask = (d < D) & active
    bits = clean_bits(tl.load(x_ptr + row.to(tl.int64) * x_stride + d, mask=mask, other=0.0), BITS, EMPTY)
    turn = tl.load(turns_ptr + row)
    for receiver in tl.static_range(RECEIVERS):
        send(inboxes[receiver], (turn * ROWS + row).to(tl.int64) * D + d, bits, mask, BITS)
    tl.debug_barrier()  # a warp that starts late must not load the next turn
    tl.store(turns_ptr + row, (turn + 1) % DEPTH, mask=active)


@triton.jit(do_not_specialize=["timeout_us"])
def _receive_kernel(
    out_ptr, count_ptr, inbox, turns_ptr, failed_ptr, seen_ptr, out_stride, timeout_us,
    D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    BITS: tl.constexpr, EMPTY: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)[None, :]
    wait_for_inputs(OVERLAP)
    active = _is_active(row, count_ptr)
    turn = tl.load(turns_ptr + row)
    slots = tl.multiple_of(inbox.to(tl.int64).to(tl.pointer_type(BITS)), 16)
    places = slots + (turn * ROWS + row).to(tl.int64) * D + d
    bits = receive(places, (d < D) & active, failed_ptr, seen_ptr, timeout_us, EMPTY, TIMED)
    x = bits.to(out_ptr.dtype.element_ty, bitcast=True)
    tl.store(out_ptr + row.to(tl.int64) * out_stride + d, x, mask=d < D)
    tl.store(turns_ptr + row, (turn + 1) % DEPTH, mask=active)


@dataclass(frozen=True, slots=True)
class InboxShape:
    """How much an inbox holds: ``depth`` messages of up to ``rows`` rows of ``dim`` values."""

    rows: int
    dim: int
    depth: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.depth * self.rows * self.dim * self.dtype.itemsize

    @property
    def block(self) -> int:
        """Elements of a kernel's tile."""
        return max(LEAST_BLOCK, power_of_2(self.dim))

    def clear(self, memory: Tensor) -> None:
        """Empty every slot of an inbox, uint8 [nbytes]."""
        memory.view(bits_of(self.dtype)).fill_(empty_bits(self.dtype))


@dataclass(frozen=True, slots=True)
class ActivationSender:
    """Sends rows to the inboxes of the ranks of the next stage that read from this one: none or several."""

    shape: InboxShape
    inboxes: tuple[int, ...]
    """Their addresses, as this process maps them."""
    turns: Tensor
    """int32 [rows]: zeros at the start."""

    def __call__(self, x_TD: Tensor, count: Tensor | None = None) -> None:
        """Send the first ``count`` rows (int32 [1] on the device), or all of them."""
        if not self.inboxes:
            return
        shape, device = self.shape, x_TD.device
        _send_kernel[(x_TD.shape[0],)](
            x_TD, count, self.inboxes, self.turns, x_TD.stride(0),
            shape.dim, shape.rows, shape.depth, len(self.inboxes), shape.block,
            BITS[bits_of(shape.dtype)], empty_bits(shape.dtype), overlaps_launches(device),
            **launch_options(device, num_warps(shape.block)),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ActivationReceiver:
    """Waits for rows in this rank's inbox."""

    shape: InboxShape
    inbox: int
    """Its address."""
    turns: Tensor
    """int32 [rows]: zeros at the start."""
    alarm: PeerAlarm

    def __call__(self, num_rows: int, count: Tensor | None = None) -> Tensor:
        """Return rows [num_rows, D], of which the first ``count`` (int32 [1] on the device) are sent; others are 0."""
        shape, device = self.shape, self.turns.device
        out_TD = torch.empty((num_rows, shape.dim), dtype=shape.dtype, device=device)
        _receive_kernel[(num_rows,)](
            out_TD, count, self.inbox, self.turns, self.alarm.failed, self.alarm.seen,
            out_TD.stride(0), self.alarm.timeout_us,
            shape.dim, shape.rows, shape.depth, shape.block,
            BITS[bits_of(shape.dtype)], empty_bits(shape.dtype), TIMED, overlaps_launches(device),
            **launch_options(device, num_warps(shape.block)),
        )  # fmt: skip
        return out_TD
