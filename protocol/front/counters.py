"""What the counters of a server say together.

Of a router's, those of one replica have its name before them: ``replica0_running`` is ``running`` of ``replica0``.
"""

import re
from collections.abc import Mapping

_OF_REPLICA = re.compile(r"(replica\d+)_(.+)")


def by_replica(stats: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the counters of each replica, by its name, in the order of the numbers; empty for a server."""
    found: dict[str, dict[str, float]] = {}
    for name, value in stats.items():
        if match := _OF_REPLICA.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = value
    return dict(sorted(found.items(), key=lambda each: (len(each[0]), each[0])))


def kv_share(stats: Mapping[str, float]) -> float:
    """Return the used share of the KV cache: of two pools, that of which less is left."""
    pools = ("kv_blocks", "window_pages")
    return max(stats.get(f"{pool}_used", 0.0) / max(1.0, stats.get(f"{pool}_total", 0.0)) for pool in pools)
