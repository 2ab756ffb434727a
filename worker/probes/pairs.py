"""Try the memory of every pair of GPUs in both directions, by the driver alone: ``python -m mgpu.worker.probes.pairs``.

Drivers have announced peer access that hangs (an IOMMU, ACS) or that damages data (patched drivers). Each pair sends
random bytes both ways at once, by kernels that write, by kernels that read and by the copy engines, while both GPUs are
busy with copies of their own. What arrives is compared on the host. The answer is one line of JSON for each pair, as
soon as it is known: a pair that hangs is the first one without a line, and the parent ends this process.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mgpu.worker.probes.cuda_driver import Driver, DriverError

SIZES = (4 << 10, (1 << 20) + (4 << 10), 8 << 20)
ROUNDS = 3
_MOST = max(SIZES)
_LOAD_BYTES, _LOAD_COPIES = 32 << 20, 40
_BLOCKS, _THREADS = 64, 256
_WORD = 8
_PTX = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry copy(.param .u64 to, .param .u64 from, .param .u64 count)
{
    .reg .pred %p;
    .reg .b32 %r<5>;
    .reg .b64 %d<10>;
    ld.param.u64 %d1, [to];
    ld.param.u64 %d2, [from];
    ld.param.u64 %d3, [count];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r3, %r1, %r2, %r3;
    mov.u32 %r4, %nctaid.x;
    mul.lo.u32 %r4, %r4, %r2;
    cvt.u64.u32 %d4, %r3;
    cvt.u64.u32 %d5, %r4;
loop:
    setp.ge.u64 %p, %d4, %d3;
    @%p bra done;
    shl.b64 %d6, %d4, 3;
    add.u64 %d7, %d2, %d6;
    ld.volatile.global.u64 %d8, [%d7];
    add.u64 %d9, %d1, %d6;
    st.volatile.global.u64 [%d9], %d8;
    add.u64 %d4, %d4, %d5;
    bra loop;
done:
    ret;
}
\0"""
"""Copies ``count`` words of 8 bytes. Its instructions are older than any GPU that is supported."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: its context, a stream for messages and one for load, and buffers on it."""

    driver: Driver
    ordinal: int
    device: ctypes.c_int
    context: ctypes.c_void_p
    stream: ctypes.c_void_p
    load_stream: ctypes.c_void_p
    kernel: ctypes.c_void_p
    source: ctypes.c_uint64
    """Random bytes that others are sent or read."""
    target: ctypes.c_uint64
    load: ctypes.c_uint64

    @staticmethod
    def open(driver: Driver, ordinal: int) -> "Gpu":
        device = driver.value("cuDeviceGet", ctypes.c_int, ordinal)
        context = driver.value("cuDevicePrimaryCtxRetain", ctypes.c_void_p, device)
        driver.call("cuCtxSetCurrent", context)
        module = driver.value("cuModuleLoadData", ctypes.c_void_p, _PTX)
        return Gpu(
            driver,
            ordinal,
            device,
            context,
            stream=driver.value("cuStreamCreate", ctypes.c_void_p, 1),  # 1: beside the default one
            load_stream=driver.value("cuStreamCreate", ctypes.c_void_p, 1),
            kernel=driver.value("cuModuleGetFunction", ctypes.c_void_p, module, b"copy"),
            source=driver.value("cuMemAlloc_v2", ctypes.c_uint64, ctypes.c_size_t(_MOST)),
            target=driver.value("cuMemAlloc_v2", ctypes.c_uint64, ctypes.c_size_t(_MOST)),
            load=driver.value("cuMemAlloc_v2", ctypes.c_uint64, ctypes.c_size_t(2 * _LOAD_BYTES)),
        )

    def use(self) -> None:
        self.driver.call("cuCtxSetCurrent", self.context)

    def reach(self, other: "Gpu") -> None:
        """Let this GPU use the memory of another. DriverError if it cannot."""
        self.use()
        if not self.driver.value("cuDeviceCanAccessPeer", ctypes.c_int, self.device, other.device).value:
            raise DriverError("no peer access")
        try:
            self.driver.call("cuCtxEnablePeerAccess", other.context, 0)
        except DriverError as error:
            if "ALREADY_ENABLED" not in str(error):
                raise

    def fill(self, data: bytes) -> None:
        """Put data into the source, and other bytes into the target."""
        self.use()
        self.driver.call("cuMemcpyHtoD_v2", self.source, data, ctypes.c_size_t(len(data)))
        self.driver.call("cuMemsetD8_v2", self.target, 0xA5, ctypes.c_size_t(len(data)))
        self.driver.call("cuCtxSynchronize")

    def be_busy(self) -> None:
        """Begin to copy within this GPU's memory."""
        self.use()
        half = ctypes.c_uint64(self.load.value + _LOAD_BYTES)
        for _ in range(_LOAD_COPIES):
            self.driver.call("cuMemcpyDtoDAsync_v2", half, self.load, ctypes.c_size_t(_LOAD_BYTES), self.load_stream)

    def launch(self, to: ctypes.c_uint64, source: ctypes.c_uint64, nbytes: int) -> None:
        """Begin to copy by a kernel of this GPU."""
        self.use()
        values = to, source, ctypes.c_uint64(nbytes // _WORD)
        pointers = (ctypes.c_void_p * 3)(*(ctypes.cast(ctypes.byref(each), ctypes.c_void_p) for each in values))
        self.driver.call("cuLaunchKernel", self.kernel, _BLOCKS, 1, 1, _THREADS, 1, 1, 0, self.stream, pointers, None)

    def copy(self, to: ctypes.c_uint64, source: ctypes.c_uint64, nbytes: int) -> None:
        """Begin to copy by a copy engine."""
        self.use()
        self.driver.call("cuMemcpyDtoDAsync_v2", to, source, ctypes.c_size_t(nbytes), self.stream)

    def finish(self) -> None:
        self.use()
        self.driver.call("cuCtxSynchronize")

    def received(self, nbytes: int) -> bytes:
        """Return what is in the target."""
        self.use()
        found = ctypes.create_string_buffer(nbytes)
        self.driver.call("cuMemcpyDtoH_v2", found, self.target, ctypes.c_size_t(nbytes))
        return found.raw


def pair_problem(first: Gpu, second: Gpu, draw: random.Random) -> str:
    """Return what is wrong between two GPUs; empty if nothing is."""
    try:
        first.reach(second)
        second.reach(first)
        for round_ in range(ROUNDS):
            for nbytes in SIZES:
                if problem := _message_problem(first, second, nbytes, draw):
                    return f"{problem} of {nbytes} bytes in round {round_ + 1}"
    except DriverError as error:
        return str(error)
    return ""


def _message_problem(first: Gpu, second: Gpu, nbytes: int, draw: random.Random) -> str:
    """Send both ways at once, in each of the three ways."""
    for way in ("writing", "reading", "copying"):
        sent = draw.randbytes(nbytes), draw.randbytes(nbytes)
        for gpu, data in zip((first, second), sent, strict=True):
            gpu.fill(data)
            gpu.be_busy()
        for gpu, other in ((first, second), (second, first)):
            if way == "writing":
                gpu.launch(other.target, gpu.source, nbytes)
            elif way == "reading":
                gpu.launch(gpu.target, other.source, nbytes)
            else:
                gpu.copy(other.target, gpu.source, nbytes)
        for gpu in (first, second):
            gpu.finish()
        for gpu, data in ((second, sent[0]), (first, sent[1])):
            if gpu.received(nbytes) != data:
                return f"{way} damages messages"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mgpu.worker.probes.pairs", description=__doc__)
    parser.add_argument("pairs", nargs="+", help="A-B, ordinals of visible GPUs")
    pairs = [tuple(map(int, pair.split("-"))) for pair in parser.parse_args().pairs]
    run(pairs)
    sys.stdout.flush()
    os._exit(0)  # a driver with a damaged context may hang in its clean-up


def run(pairs: Sequence[tuple[int, ...]]) -> None:
    """Try pairs in order; print a line for each."""
    try:
        driver = Driver()
        gpus = {ordinal: Gpu.open(driver, ordinal) for ordinal in sorted(set(itertools.chain(*pairs)))}
    except DriverError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    draw = random.Random(0)
    for a, b in pairs:
        print(json.dumps({"pair": [a, b], "problem": pair_problem(gpus[a], gpus[b], draw)}), flush=True)


if __name__ == "__main__":
    main()
