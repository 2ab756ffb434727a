"""One attempt to continue a request that another gateway, or another connection, began.

The engine goes on generating without a gateway, and its journal has every token. A resumption asks for that record
in portions and replays them (replay.py). A portion that leaves nothing out is the last one: from then on the engine's
steps continue the request. What the engine says of it before is ignored, because the next portion has it as well.

Example: a client has 3 of 5,000 tokens when its gateway dies. It connects to the next gateway and sends ``resume`` with
offset 3. The resumption is QUEUED until its turn comes, then ASKED for what follows 0 known tokens. The engine sends
the first 4,096; the client gets ``resumed``, ``accepted`` and tokens 3 to 4,095. QUEUED and ASKED again, with 4,096
known. The engine has 5,010 tokens by now and sends the missing 914: the resumption is OVER, and token 5,010 comes with
the engine's next step. Had the client resumed once more on a new connection while the engine was ASKED, the answer
would have been OUTDATED, and the new connection QUEUED to get everything anew.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.requests.replay import Replay
from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.orchestrator.gateway.requests.table import Name
from mgpu.protocol.front.client_messages import ResumeRequest


class ResumptionState(Enum):
    QUEUED = auto()
    """It waits for its turn to ask the engine."""
    ASKED = auto()
    """The engine has been asked for the next portion."""
    OUTDATED = auto()
    """The engine has been asked, but for a connection that has lost the request since: its answer does not count."""
    ABANDONED = auto()
    """No answer came in time, and the client was told to ask again; the engine may still answer."""
    OVER = auto()


TRANSITIONS: dict[ResumptionState, tuple[ResumptionState, ...]] = {
    ResumptionState.QUEUED: (ResumptionState.ASKED, ResumptionState.ABANDONED),
    ResumptionState.ASKED: (
        ResumptionState.QUEUED,
        ResumptionState.OUTDATED,
        ResumptionState.ABANDONED,
        ResumptionState.OVER,
    ),
    ResumptionState.OUTDATED: (ResumptionState.QUEUED, ResumptionState.ABANDONED),
    ResumptionState.ABANDONED: (ResumptionState.OVER,),
    ResumptionState.OVER: (),
}


@dataclass(slots=True, eq=False)
class Resumption:
    """Which connection wants the request, and how far it is."""

    connection: bytes
    account: Account
    message: ResumeRequest
    overdue_s: float
    state: ResumptionState = ResumptionState.QUEUED
    query_id: int = 0
    """Of the last question to the engine; 0: it has not been asked."""
    request: Request | None = None
    """In the table from the first portion on."""
    replays: list[Replay] = field(default_factory=list)
    """One per choice of ``request``."""
    is_cancelled: bool = False
    """The client has cancelled the request, which ends as soon as its first portion is there."""

    @property
    def name(self) -> Name:
        return self.message.session, self.message.id

    @property
    def known(self) -> list[int]:
        """Per choice, the tokens that have come; empty before the first portion."""
        return [replay.known for replay in self.replays]

    def move_to(self, state: ResumptionState) -> None:
        """Change the state. AssertionError for a transition that is not in the table: our own mistake."""
        assert state in TRANSITIONS[self.state], f"a resumption cannot go from {self.state.name} to {state.name}"
        self.state = state

    def hand_over(self, connection: bytes, account: Account, message: ResumeRequest) -> None:
        """Start again for the connection that has resumed the request last. The time to answer stays as it is."""
        self.connection, self.account, self.message = connection, account, message
        self.request, self.replays, self.is_cancelled = None, [], False
        if self.state is ResumptionState.ASKED:
            self.move_to(ResumptionState.OUTDATED)
