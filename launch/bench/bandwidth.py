"""Measure how fast all cores together read memory: ``python -m mgpu.launch.bench.bandwidth`` is one core's part.

A search for a byte that does not occur reads everything, at the speed of the memory on all common machines.
"""

import os
import subprocess
import sys
import time

BLOCK_BYTES = 128 << 20
"""Per core: larger than what a core has of the last cache, small enough for any machine."""
SECONDS = 0.4
_DEADLINE_S = 30.0


def read_speed(seconds: float, nbytes: int = BLOCK_BYTES) -> float:
    """Give the bytes per second at which this process reads; the best of its passes."""
    block = bytearray(b"\1") * nbytes  # written, so that it is memory and not one shared page of zeros
    best, until_s = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until_s or not best:
        began_s = time.perf_counter()
        block.find(b"\0")
        best = max(best, nbytes / (time.perf_counter() - began_s))
    return best


def machine_read_speed() -> float:
    """Give the bytes per second of processes that read side by side, one per core that this one may use."""
    command = [sys.executable, "-m", "mgpu.launch.bench.bandwidth"]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in os.sched_getaffinity(0)]
    try:
        return sum(float(reader.communicate(timeout=_DEADLINE_S)[0]) for reader in readers)
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


if __name__ == "__main__":
    print(read_speed(SECONDS))
