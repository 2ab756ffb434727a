# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Bring chosen tokens from the last stage back to the rows of the first one, on the device.

The first stage needs a row's token when it computes that row again, some steps after the last stage was given the row.
Its table of tokens says which tokens are still under way: `expect` stores minus the tag of the step there, and `fetch`,
in the step that computes the position, waits for a letter with this tag in the row's mailbox and stores the token.
A letter is one 64-bit word, tag and token, so no fence is needed, and letters that nobody fetched do no harm.

Worked example, two stages, row 0 with a prompt of 3 tokens:

    step 1, first stage    computes positions 0 to 2, stores tokens[0, 3] = -1 (tag 1)
    step 1, last stage     chooses token 50, writes the letter (1, 50) into mailbox 0
    step 3, first stage    computes position 3: finds -1, waits for a letter with tag 1, stores tokens[0, 3] = 50

If the request ends with 50, nobody fetches the letter. The row's next request expects a letter of a later step.
"""

# N tokens that a step computes, S rows that sample

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.peers.memory import PeerAlarm
from mgpu.worker.kernels.peers.messages import TIMED, clock
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, wait_for_inputs

LETTER_BYTES = 8
_BLOCK = 64
"""Rows per program, at least as many as a warp has threads: see `messages.receive`."""


@triton.jit
def _letters(mail, rows, due):
    slots = tl.multiple_of(mail.to(tl.int64).to(tl.pointer_type(tl.int64)), 8)
    return tl.load(slots + rows, mask=due, other=0, volatile=True)


@triton.jit(do_not_specialize=["N", "timeout_us"])
def _fetch_kernel(
    rows_ptr, positions_ptr, count_ptr, tokens_ptr, mail, failed_ptr, seen_ptr, tokens_stride, N, timeout_us,
    BLOCK: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    mask = n < N
    if count_ptr is not None:
        mask = mask & (n < tl.load(count_ptr))
    row = tl.load(rows_ptr + n, mask=mask, other=0).to(tl.int64)
    places = tokens_ptr + row * tokens_stride + tl.load(positions_ptr + n, mask=mask, other=0)
    expected = tl.load(places, mask=mask, other=0)
    due = mask & (expected < 0)
    patience = tl.where(tl.load(failed_ptr) == 0, timeout_us, 0).to(tl.int64)
    if TIMED:
        patience *= 1000
    letters = _letters(mail, row, due)
    missing = tl.max((due & ((letters >> 32) != -expected)).to(tl.int32), 0)
    began = clock(TIMED)
    looks = tl.full((), 0, tl.int64)
    while (missing != 0) & (looks < patience):
        letters = _letters(mail, row, due)
        missing = tl.max((due & ((letters >> 32) != -expected)).to(tl.int32), 0)
        if TIMED:
            looks = clock(TIMED) - began
        else:
            looks += 1
    if missing != 0:
        tl.store(failed_ptr, 1)
        tl.store(seen_ptr, 1)
    token = tl.where((letters >> 32) == -expected, letters & 0x7FFFFFFF, 0)  # in vain: some token that exists
    tl.store(places, token.to(tl.int32), mask=due)


@triton.jit(do_not_specialize=["S"])
def _expect_kernel(
    rows_ptr, positions_ptr, tag_ptr, tokens_ptr, tokens_stride, S, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    row = tl.load(rows_ptr + s, mask=s < S, other=0).to(tl.int64)
    position = tl.load(positions_ptr + s, mask=s < S, other=0)
    tag = tl.load(tag_ptr).to(tl.int32)
    # No token is ever chosen for position 0: such rows only fill up a graph's batch.
    tl.store(tokens_ptr + row * tokens_stride + position, tl.zeros_like(row).to(tl.int32) - tag, mask=position > 0)


@triton.jit(do_not_specialize=["S"])
def _post_kernel(
    ids_ptr, rows_ptr, positions_ptr, tag_ptr, enabled_ptr, mails, S,
    RECEIVERS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    mask = s < S
    if enabled_ptr is not None:
        mask = mask & (tl.load(enabled_ptr) != 0)
    position = tl.load(positions_ptr + s, mask=mask, other=0)
    row = tl.load(rows_ptr + s, mask=mask, other=0).to(tl.int64)
    letters = (tl.load(tag_ptr).to(tl.int64) << 32) | tl.load(ids_ptr + s, mask=mask, other=0).to(tl.int64)
    for receiver in tl.static_range(RECEIVERS):
        slots = tl.multiple_of(mails[receiver].to(tl.int64).to(tl.pointer_type(tl.int64)), 8)
        tl.store(slots + row, letters, mask=mask & (position > 0))


@dataclass(frozen=True, slots=True)
class Mailbox:
    """The first stage's end: one letter per row."""

    address: int
    """Of int64 [rows], zeros at the start."""
    alarm: PeerAlarm

    def fetch(self, tokens: Tensor, rows_N: Tensor, positions_N: Tensor, count: Tensor | None = None) -> None:
        """Wait for those tokens that are expected, and store them in the table, int32 [rows, width].

        The first ``count`` (int32 [1] on the device) of the pairs of row and position count; without it all do.
        """
        device, num = tokens.device, rows_N.shape[0]
        _fetch_kernel[(ceil_div(num, _BLOCK),)](
            rows_N, positions_N, count, tokens, self.address, self.alarm.failed, self.alarm.seen,
            tokens.stride(0), num, self.alarm.timeout_us, _BLOCK, TIMED, overlaps_launches(device),
            **launch_options(device, 1),
        )  # fmt: skip

    def expect(self, tokens: Tensor, rows_S: Tensor, positions_S: Tensor, tag: Tensor) -> None:
        """Note that the tokens at ``positions`` come with the tag ([1] on the device); position 0 is padding.

        Must be launched before the step's activations are sent.
        """
        device, num = tokens.device, rows_S.shape[0]
        _expect_kernel[(ceil_div(num, _BLOCK),)](
            rows_S, positions_S, tag, tokens, tokens.stride(0), num, _BLOCK, overlaps_launches(device),
            **launch_options(device, 1),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Postman:
    """The last stage's end: the mailboxes of the first stage's ranks that this rank serves, none or several."""

    addresses: tuple[int, ...]

    def __call__(
        self, ids_S: Tensor, rows_S: Tensor, positions_S: Tensor, tag: Tensor, enabled: Tensor | None = None
    ) -> None:
        """Send the tokens of a step; nothing where ``enabled`` ([1] on the device) is 0, or the position is 0."""
        if not self.addresses:
            return
        device, num = ids_S.device, ids_S.shape[0]
        _post_kernel[(ceil_div(num, _BLOCK),)](
            ids_S, rows_S, positions_S, tag, enabled, self.addresses, num,
            len(self.addresses), _BLOCK, overlaps_launches(device), **launch_options(device, 1),
        )  # fmt: skip
