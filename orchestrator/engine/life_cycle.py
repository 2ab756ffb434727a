"""The states of a server.

The start uses the code of a recovery. The epoch is the number of the worker group: 0 for the first one, and one more
after each replacement. Two things differ at the start. A failure ends the server, because nothing has shown yet that it
can work; and requests are not taken. Draining says nothing of the workers: they are replaced while draining too, so
that running requests still finish. Every state may go to stopped: by a second signal, by a failure, or when all
requests have ended.

    starting ──▶ ready ◀──▶ recovering
        │          └────┬───────┘
        │            draining
        └──────▶ stopped ◀── all
"""

from enum import StrEnum


class ServerState(StrEnum):
    """What clients see as the state of the server."""

    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    DRAINING = "draining"
    STOPPED = "stopped"


NEXT = {
    ServerState.STARTING: {ServerState.READY, ServerState.STOPPED},
    ServerState.READY: {ServerState.RECOVERING, ServerState.DRAINING, ServerState.STOPPED},
    ServerState.RECOVERING: {ServerState.READY, ServerState.DRAINING, ServerState.STOPPED},
    ServerState.DRAINING: {ServerState.STOPPED},
    ServerState.STOPPED: set(),
}
"""Every legal transition."""


class LifeCycle:
    """The state of one server, written by the engine only."""

    def __init__(self) -> None:
        self.state = ServerState.STARTING

    def enter(self, state: ServerState) -> None:
        """Change the state."""
        assert state in NEXT[self.state], f"{self.state} → {state}"
        self.state = state
