"""The counters of one replica among those of a router: ``replica0_running`` is ``running`` of ``replica0``."""

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
