"""Measure how fast each visible GPU copies its memory just now: ``python -m mgpu.worker.probes.speed``.

Another process may keep a GPU busy, and nothing but a measurement shows what is left. Work comes in short bursts, as
steps of a stage do: between two bursts the other process gets the GPU. One line of JSON on standard output: bytes per
second by the GPU's number, without those that could not be measured. It calls the driver alone, so it takes a second.
"""

import ctypes
import json
import sys
import time

from mgpu.worker.probes.cuda_driver import Driver, DriverError

_SIZES = (256 << 20, 32 << 20)
"""Bytes of a copy; the second if the GPU has no room for the first."""
_BURST_BYTES, _BURSTS, _WARM = 2 << 30, 80, 8
_PAUSE_S = 0.001


def main() -> int:
    """Print the speeds; 1 without a driver."""
    try:
        driver = Driver()
        count = driver.value("cuDeviceGetCount", ctypes.c_int).value
    except DriverError as error:
        print(error, file=sys.stderr)
        return 1
    found: dict[str, float] = {}
    for ordinal in range(count):
        try:
            found[str(ordinal)] = _measure(driver, ordinal)
        except DriverError as error:
            print(f"GPU {ordinal}: {error}", file=sys.stderr)
    print(json.dumps(found))
    return 0


def _measure(driver: Driver, ordinal: int) -> float:
    """Return the bytes per second, read and written, over all bursts."""
    device = driver.value("cuDeviceGet", ctypes.c_int, ordinal)
    context = driver.value("cuDevicePrimaryCtxRetain", ctypes.c_void_p, device)
    driver.call("cuCtxSetCurrent", context)
    try:
        stream = driver.value("cuStreamCreate", ctypes.c_void_p, 1)
        source, target, size = _allocate(driver)
        took_s = 0.0
        for burst in range(_WARM + _BURSTS):
            began_s = time.perf_counter()
            for _ in range(_BURST_BYTES // (2 * size)):
                driver.call("cuMemcpyDtoDAsync_v2", target, source, ctypes.c_size_t(size), stream)
            driver.call("cuStreamSynchronize", stream)
            took_s += time.perf_counter() - began_s if burst >= _WARM else 0.0
            time.sleep(_PAUSE_S)
        return _BURSTS * _BURST_BYTES / took_s
    finally:
        driver.call("cuDevicePrimaryCtxRelease_v2", device)


def _allocate(driver: Driver) -> tuple[ctypes.c_uint64, ctypes.c_uint64, int]:
    for size in _SIZES:
        try:
            source, target = (driver.value("cuMemAlloc_v2", ctypes.c_uint64, ctypes.c_size_t(size)) for _ in range(2))
        except DriverError:
            continue
        return source, target, size
    raise DriverError("no memory is free")


if __name__ == "__main__":
    raise SystemExit(main())
