# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Send to and receive from peer GPUs, as kernels do it; `memory` explains the protocol.

A message takes one way over the link: no flag and no fence follows it, because every element shows by itself that it
has arrived. Waits end at a deadline, so that a dead peer is an error.
"""

import torch
import triton
import triton.language as tl

from mgpu.worker.kernels.runtime import INTERPRETED

TIMED = not INTERPRETED
"""Whether waits are bounded by the GPU's clock; the interpreter has none and counts looks."""
BITS = {torch.int16: tl.int16, torch.int32: tl.int32}


@triton.jit
def clean_bits(x, BITS: tl.constexpr, EMPTY: tl.constexpr):
    """Return the bits of x, with those of an empty slot (-0.0) replaced by those of zero."""
    bits = x.to(BITS, bitcast=True)
    return tl.where(bits == EMPTY, 0, bits).to(BITS)


@triton.jit
def send(address, place, bits, mask, BITS: tl.constexpr):
    """Write to a peer's area."""
    to = tl.multiple_of(address.to(tl.int64).to(tl.pointer_type(BITS)), 16)
    tl.store(to + place, bits, mask=mask)


@triton.jit
def clock(TIMED: tl.constexpr):
    """Return nanoseconds; 0 in the interpreter."""
    now = tl.full((), 0, tl.int64)
    if TIMED:
        now = tl.extra.cuda.globaltimer()
    return now


@triton.jit
def _missing(bits, EMPTY: tl.constexpr):
    return tl.max(tl.max((bits == EMPTY).to(tl.int32), 1), 0)


@triton.jit
def receive(places, arrives, failed_ptr, seen_ptr, timeout_us, EMPTY: tl.constexpr, TIMED: tl.constexpr):
    """Wait until every slot that ``arrives`` has its data, empty the slots, and return the bits; elsewhere they are 0.

    Both are two-dimensional and have at least as many elements as the program has threads: if several threads held a
    copy of an element, they could read it at different moments. A wait past the deadline sets the alarm, and later
    kernels do not wait.
    """
    patience = tl.where(tl.load(failed_ptr) == 0, timeout_us, 0).to(tl.int64)
    if TIMED:
        patience *= 1000
    bits = tl.load(places, mask=arrives, other=0, volatile=True)
    missing = _missing(bits, EMPTY)
    began = clock(TIMED)
    looks = tl.full((), 0, tl.int64)
    while (missing != 0) & (looks < patience):
        bits = tl.load(places, mask=arrives, other=0, volatile=True)
        missing = _missing(bits, EMPTY)
        if TIMED:
            looks = clock(TIMED) - began
        else:
            looks += 1
    if missing != 0:
        tl.store(failed_ptr, 1)
        tl.store(seen_ptr, 1)
    tl.store(places, tl.full(places.shape, EMPTY, bits.dtype), mask=arrives)
    return bits
