"""Sequences that keep row and blocks and are in no step for a while, so that steps are short for others.

An owner that came first may run so many sequences that each step is long. What another owner with few asks for then
takes as many long steps as it has tokens, and it has a small part of the time instead of its share. So sequences of
owners with many take turns: in each step as many decode as have room beside what those with few run
(`RunningShares.most_at_once`), and the others rest. Each turn has `TURN_STEPS` steps; who has rested longest is next.

Example: A decodes 256 sequences, and a step takes 400 ms. B sends 4 requests. A step of 4 takes 20 ms, and one of 12
takes 35 ms, so 8 of A's sequences decode beside B's for 8 steps, then the next 8. When B's have ended, all decode.

A row that is in no step stays as it is on the workers: they know its last token, as with stages whose turn it is not.
"""

from collections import deque

from mgpu.orchestrator.scheduler.decode_batch import DecodeBatch
from mgpu.orchestrator.scheduler.running_shares import RunningShares
from mgpu.orchestrator.scheduler.sequence import Sequence

TURN_STEPS = 8


class Resting:
    """The sequences of one decode batch that rest."""

    def __init__(self, batch: DecodeBatch, shares: RunningShares) -> None:
        self._batch, self._shares = batch, shares
        self._line: deque[Sequence] = deque()
        """Who has rested longest is first."""
        self._steps = 0
        """Since somebody has to rest."""

    def begin_step(self) -> None:
        """Let sequences rest, or go on, before a step of the batch is planned."""
        if not self._shares.has_guests:
            self._steps = 0
            while self._line:
                self._go_on(self._line.popleft())
            return
        if self._steps % TURN_STEPS == 0:
            self._take_turns(self._shares.most_at_once())
        self._steps += 1

    def end(self, seq: Sequence) -> bool:
        """Note that a sequence leaves the workers; return whether it rested."""
        if not seq.rests or seq not in self._line:
            return False
        self._line.remove(seq)
        self._note(seq, False)
        return True

    def _take_turns(self, room: int) -> None:
        rested = list(self._line)
        ran = [seq for seq in self._batch.members if self._shares.takes_turns(seq)]
        used: dict[int, int] = {}
        self._line.clear()
        for seq in rested + ran:
            owner, is_at_rest = seq.account[0], seq.rests
            used[owner] = used.get(owner, 0) + seq.token_cost
            if used[owner] <= max(room, seq.token_cost):
                if is_at_rest:
                    self._go_on(seq)
                continue
            self._line.append(seq)
            if not is_at_rest:
                self._batch.remove(seq)
                self._note(seq, True)

    def _go_on(self, seq: Sequence) -> None:
        self._note(seq, False)
        self._batch.add(seq, seq.num_computed)

    def _note(self, seq: Sequence, rests: bool) -> None:
        seq.rests = rests
        self._shares.note_rest(seq)
