"""Ask the engine for portions of its records, a few at a time, in turns by owner and account."""

from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.orchestrator.gateway.requests.resumption import Resumption, ResumptionState
from mgpu.protocol.internal.gateway_messages import RecordQuery

MAX_RECORDS_AT_ONCE = 8
"""The steps of other requests wait behind at most this many portions; `resume_journal` bounds the size of each."""


class RecordQueue:
    """Resumptions that are QUEUED, and those for which the engine has been asked."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._turns: FairTurns[Resumption] = FairTurns()
        """Each portion counts the same."""
        self._asked: dict[int, Resumption] = {}
        self._next_query = 1

    def add(self, resumption: Resumption) -> None:
        self._turns.put(resumption.account.path, resumption)
        self._ask_next()

    def take_answered(self, query_id: int) -> Resumption | None:
        """Return the resumption whose question the engine has answered; None if it has been abandoned."""
        resumption = self._asked.pop(query_id, None)
        self._ask_next()
        return resumption

    def abandon(self, resumptions: list[Resumption]) -> None:
        """Wait no longer for these. Of those that have not been asked for, ask what runs, without any tokens."""
        for resumption in resumptions:
            if resumption.state is ResumptionState.QUEUED:
                self._ask(resumption, [-1] * len(resumption.message.offsets), [-1] * len(resumption.message.offsets))
            else:
                del self._asked[resumption.query_id]
            resumption.move_to(ResumptionState.ABANDONED)
        self._ask_next()

    def _ask_next(self) -> None:
        while len(self._asked) < MAX_RECORDS_AT_ONCE and (taken := self._turns.take()) is not None:
            path, resumption = taken
            self._turns.charge(path, 1.0)
            if resumption.state is ResumptionState.QUEUED:  # else it was abandoned
                resumption.move_to(ResumptionState.ASKED)
                self._ask(resumption, resumption.known, list(resumption.message.offsets))
                self._asked[resumption.query_id] = resumption

    def _ask(self, resumption: Resumption, known: list[int], offsets: list[int]) -> None:
        resumption.query_id, self._next_query = self._next_query, self._next_query + 1
        self._outgoing.to_engine(RecordQuery(resumption.query_id, *resumption.name, known, offsets))
