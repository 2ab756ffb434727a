"""What the ranks of one epoch have told of their start, kept by both kinds of worker group."""

from mgpu.protocol.internal.worker_messages import Loaded, LoadProgress, Ready
from mgpu.protocol.model.kv_pools import PoolSize


class RankReports:
    """Kept by rank. The base of `WorkerGroup` and `HostGroup`."""

    def __init__(self) -> None:
        self.loaded: dict[int, Loaded] = {}
        self.ready: dict[int, Ready] = {}
        self.progress: dict[int, LoadProgress] = {}

    def keep(self, rank: int, message: object) -> None:
        """Keep a report of a rank's start; drop any other message."""
        if isinstance(message, LoadProgress):
            self.progress[rank] = message
        elif isinstance(message, Loaded):
            self.loaded[rank] = message
        elif isinstance(message, Ready):
            self.ready[rank] = message

    def phase_of(self, rank: int) -> str:
        """Return the last that is known of what a rank does."""
        progress = self.progress.get(rank)
        return "steps" if rank in self.ready else progress.phase if progress else "spawn"

    def smallest_pools(self, at_most: PoolSize | None) -> PoolSize:
        """Return the smallest pools that any rank could hold, or those of ``at_most`` where they are smaller."""
        sizes = [PoolSize(loaded.num_blocks, loaded.num_pages) for loaded in self.loaded.values()]
        return PoolSize(*map(min, zip(*sizes, *[at_most] * (at_most is not None), strict=True)))
