"""Find the processors next to a PCI device, as the kernel lists them."""

import re
from pathlib import Path

SYSTEM = Path("/sys")
_BUS_ID = re.compile(r"([0-9A-Fa-f]{4,8}):([0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f])")


def numa_node(bus_id: str, system: Path = SYSTEM) -> int:
    """Return the NUMA node of a device by NVML's bus id, such as 00000000:17:00.0; -1 if it is not known."""
    match = _BUS_ID.fullmatch(bus_id)
    if match is None:
        return -1
    address = f"{match[1][-4:]}:{match[2]}".lower()
    try:
        return int((system / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def cpus_of_node(node: int, system: Path = SYSTEM) -> frozenset[int]:
    """Return the processors of a node; empty if the machine has only one, or if they are not known."""
    nodes = system / "devices/system/node"
    if node < 0 or len(list(nodes.glob("node[0-9]*"))) < 2:
        return frozenset()
    try:
        return frozenset(read_cpus((nodes / f"node{node}" / "cpulist").read_text()))
    except (OSError, ValueError):
        return frozenset()


def read_cpus(text: str) -> list[int]:
    """Read a list such as ``0-3,8``. ValueError for anything else."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
