"""Find the sequence that crashes the workers, among all that were running when they died.

A sequence that was running in `FATAL_CRASHES` crashes in a row is a suspect. A single suspect is the culprit and is
failed. Several suspects run again one at a time, each until it is past the point where the workers died: one that
crashes them again is the culprit, and one that gets past it is cleared.

Example: A, B and C run, and the workers die twice. All three are suspects. A runs alone, gets 4 tokens and is
cleared. B runs alone and the workers die: B fails. C runs alone and is cleared; A and C go on.
"""

from collections.abc import Collection

from mgpu.orchestrator.scheduler.sequence import Sequence

FATAL_CRASHES = 2
"""Crashes in a row that make a suspect of a sequence that was running in all of them."""
CLEARING_TOKENS = 4
"""Tokens that clear a suspect that runs alone; at most two of its steps were in flight when the workers died."""


def is_suspect(seq: Sequence) -> bool:
    return seq.crashes >= FATAL_CRASHES


def note_crash(live: Collection[Sequence]) -> list[Sequence]:
    """Count a crash against the sequences that were running, and return the culprit, if it is certain.

    Call it before they forget their rows.
    """
    for seq in live:
        if seq.row >= 0:
            seq.crashes += 1
        elif not is_suspect(seq):  # one that still waits for its turn to run alone remains a suspect
            seq.crashes = 0
    suspects = [seq for seq in live if seq.row >= 0 and is_suspect(seq)]
    return suspects if len(suspects) == 1 else []


class SoloRun:
    """The suspect that has the workers for itself, if there is one."""

    def __init__(self) -> None:
        self._suspect: Sequence | None = None
        self._cleared_at = 0
        """Tokens, the prompt included, at which it is cleared."""

    def holds_back(self, seq: Sequence, is_idle: bool) -> bool:
        """Return True if ``seq`` must not run now. ``is_idle``: the workers have nothing to do."""
        return self._suspect is not None or (is_suspect(seq) and not is_idle)

    def begin(self, seq: Sequence) -> None:
        """Note that a sequence begins to run. It runs alone if it is a suspect."""
        if is_suspect(seq):
            self._suspect, self._cleared_at = seq, len(seq.tokens) + CLEARING_TOKENS

    def clear(self) -> Sequence | None:
        """End the solo run of a suspect that has got far enough, and return it."""
        seq = self._suspect
        if seq is None or len(seq.tokens) < self._cleared_at:
            return None
        seq.crashes, self._suspect = 0, None
        return seq

    def end(self, seq: Sequence) -> None:
        """Note that a sequence has left the workers."""
        if seq is self._suspect:
            self._suspect = None
