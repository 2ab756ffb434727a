"""Find the request that the workers die of, among all that were running when they died.

Whoever was running in two crashes in a row is a suspect. If there is one, it is guilty. Several run one at a time, each
until it is past the place where the workers died: whoever they die of once more is guilty, the others are innocent.
"""

from collections.abc import Collection

from mgpu.orchestrator.scheduler.sequence import Sequence

FATAL_CRASHES = 2
"""Crashes in a row that make a suspect of a request that was running in all of them."""
TRIAL_TOKENS = 4
"""What a suspect must get alone; at most two of its steps were in flight when the workers died."""


def is_suspect(seq: Sequence) -> bool:
    return seq.crashes >= FATAL_CRASHES


def note_crash(live: Collection[Sequence]) -> list[Sequence]:
    """Count a crash against those that were running, and give the guilty. Call it before they forget their rows."""
    for seq in live:
        if seq.row >= 0:
            seq.crashes += 1
        elif not is_suspect(seq):  # one that still waits for its turn to run alone remains a suspect
            seq.crashes = 0
    suspects = [seq for seq in live if seq.row >= 0 and is_suspect(seq)]
    return suspects if len(suspects) == 1 else []


class Trial:
    """The suspect that has the workers for itself, if there is one."""

    def __init__(self) -> None:
        self._suspect: Sequence | None = None
        self._enough = 0
        """Tokens, its prompt included, that prove its innocence."""

    def holds_back(self, seq: Sequence, is_idle: bool) -> bool:
        """Tell whether ``seq`` must not run now; ``is_idle``: the workers have nothing to do."""
        return self._suspect is not None or (is_suspect(seq) and not is_idle)

    def begin(self, seq: Sequence) -> None:
        """Note that a request begins to run; those that are no suspects do not matter."""
        if is_suspect(seq):
            self._suspect, self._enough = seq, len(seq.tokens) + TRIAL_TOKENS

    def acquit(self) -> Sequence | None:
        """End the trial when the suspect has got far enough, and give it."""
        seq = self._suspect
        if seq is None or len(seq.tokens) < self._enough:
            return None
        seq.crashes, self._suspect = 0, None
        return seq

    def end(self, seq: Sequence) -> None:
        """Note that a request has left the workers."""
        if seq is self._suspect:
            self._suspect = None
