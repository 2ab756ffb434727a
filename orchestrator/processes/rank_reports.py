"""What the ranks of one epoch have told of their start, kept by both kinds of worker group."""

from mgpu.protocol.internal.worker_messages import Loaded, LoadProgress, Ready


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

    def fewest_blocks(self, at_most: int | None) -> int:
        """Return the smallest number of KV blocks that any rank could hold, or ``at_most`` if that is smaller."""
        num_blocks = min(loaded.num_blocks for loaded in self.loaded.values())
        return num_blocks if at_most is None else min(num_blocks, at_most)
