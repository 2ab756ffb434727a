"""What this machine's processor multiplies, by the flags that the kernel lists."""

import platform
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
_PACKED = frozenset({"avx2", "avx512f"})


@cache
def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Return the flags of the processor; none where they cannot be read, and off x86-64."""
    if platform.machine() != "x86_64":
        return frozenset()
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def multiplies_bfloat16(flags: frozenset[str]) -> bool:
    """Return True if the processor has instructions for products in bfloat16."""
    return not _BFLOAT16.isdisjoint(flags)


def multiplies_packed(flags: frozenset[str]) -> bool:
    """Return True if torch has fast products there for weights of 4 bits, with activations in bfloat16."""
    return not _PACKED.isdisjoint(flags)
