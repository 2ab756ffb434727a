# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What kernels that talk to peer GPUs share: writing to a peer's memory, and waiting for what peers write here.

See `mgpu.worker.kernels.peers.memory` for the protocol. A message needs one way over the link: no flag and
no fence follow it, because every element shows by itself that it has arrived. Waits end at a deadline, so that a dead
peer is an error.
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
    """Give the bits of x; those that mean "nothing yet" (minus zero) become zero."""
    bits = x.to(BITS, bitcast=True)
    return tl.where(bits == EMPTY, 0, bits).to(BITS)


@triton.jit
def send(address, place, bits, mask, BITS: tl.constexpr):
    """Write to a peer's area."""
    to = tl.multiple_of(address.to(tl.int64).to(tl.pointer_type(BITS)), 16)
    tl.store(to + place, bits, mask=mask)


@triton.jit
def _clock(TIMED: tl.constexpr):
    """Give nanoseconds; 0 in the interpreter."""
    now = tl.full((), 0, tl.int64)
    if TIMED:
        now = tl.extra.cuda.globaltimer()
    return now


@triton.jit
def _missing(bits, EMPTY: tl.constexpr):
    return tl.max(tl.max((bits == EMPTY).to(tl.int32), 1), 0)


@triton.jit
def receive(places, arrives, failed_ptr, seen_ptr, timeout_us, EMPTY: tl.constexpr, TIMED: tl.constexpr):
    """Wait until everything that ``arrives`` is there and empty its places; elsewhere the result is 0.

    Both are two-dimensional and no smaller than the program has threads: copies of an element in several threads could
    be read at different moments. After a wait in vain the alarm is set and nobody waits again.
    """
    patience = tl.where(tl.load(failed_ptr) == 0, timeout_us, 0).to(tl.int64)
    if TIMED:
        patience *= 1000
    bits = tl.load(places, mask=arrives, other=0, volatile=True)
    missing = _missing(bits, EMPTY)
    began = _clock(TIMED)
    looks = tl.full((), 0, tl.int64)
    while (missing != 0) & (looks < patience):
        bits = tl.load(places, mask=arrives, other=0, volatile=True)
        missing = _missing(bits, EMPTY)
        if TIMED:
            looks = _clock(TIMED) - began
        else:
            looks += 1
    if missing != 0:
        tl.store(failed_ptr, 1)
        tl.store(seen_ptr, 1)
    tl.store(places, tl.full(places.shape, EMPTY, bits.dtype), mask=arrives)
    return bits
