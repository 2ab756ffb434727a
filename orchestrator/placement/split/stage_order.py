"""Order GPUs so that activations of a layer map cross slow links as seldom as possible. Pure."""

from collections.abc import Sequence
from itertools import pairwise

from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.machine.nvml import ACROSS_SOCKETS

_MOST = 12
"""More devices stay in their order: all paths of 12 are found in a second."""
_THROUGH_HOST = 10
_NEAR = ((0, 1), (10, 2), (20, 3), (30, 4), (40, 5), (50, 8))
"""(NVML's level of the common ancestor, cost): one board, one switch, several, a host bridge, a NUMA node, sockets."""


def link_cost(machine: Machine, first: int, second: int) -> int:
    """Return how slow the way between two GPUs is, in no unit."""
    link = machine.links[first][second]
    if link == "nvlink":
        return 1
    near = next(cost for limit, cost in reversed(_NEAR) if machine.distances[first][second] >= limit)
    return near if link == "pcie" else _THROUGH_HOST + near


def stage_order(machine: Machine, ordinals: Sequence[int]) -> list[int]:
    """Return the ordinals in the order of least cost between neighbours; of equally good ones the first in order.

    They stay as they are where the driver does not say how GPUs are connected.

    A path through all GPUs is found by its subsets: the best way to have visited some of them and to end at one.
    """
    names = list(ordinals)
    if not machine.distances or not 2 < len(names) <= _MOST:
        return names
    best: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {
        (1 << at, at): (0, (name,)) for at, name in enumerate(names)
    }
    for _ in range(len(names) - 1):
        longer: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        for (visited, last), (cost, path) in best.items():
            for at, name in enumerate(names):
                if visited >> at & 1:
                    continue
                way = cost + link_cost(machine, names[last], name), (*path, name)
                key = visited | 1 << at, at
                if key not in longer or way < longer[key]:
                    longer[key] = way
        best = longer
    return list(min(best.values())[1])


def crossings(machine: Machine, order: Sequence[int]) -> int:
    """Return how many boundaries of stages in this order cross between sockets."""
    if not machine.distances:
        return 0
    return sum(
        machine.distances[a][b] >= ACROSS_SOCKETS and machine.links[a][b] != "nvlink" for a, b in pairwise(order)
    )
