"""Note what the gateway works on, and refuse what two gateways have died of."""

from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.protocol.internal.gateway_messages import Cleared, GatewaySpec
from mgpu.protocol.internal.process.work_record import Work, WorkRecord, name_of


class Suspects:
    """The messages that earlier gateways have died of, and the record of this one's work."""

    def __init__(self, spec: GatewaySpec, outgoing: Outgoing) -> None:
        self._record = WorkRecord(spec.record_fd)
        self._outgoing = outgoing
        self._died_once, self._died_twice = set(spec.died_once), frozenset(spec.died_twice)

    def begin(self, owner: str, frames: list[bytes]) -> bytes:
        """Note that a message is worked on; return its name."""
        name = name_of(owner, frames[-1] if frames else b"")
        self._record.begin(Work(owner, name))
        return name

    def check(self, name: bytes) -> None:
        """Raise Refusal if two gateways have died of this message."""
        if name in self._died_twice:
            text = "the server failed twice while it worked on this message, so it is not tried again"
            raise Refusal("engine_error", text)

    def end(self, name: bytes) -> None:
        """Note that the work is done. If a gateway had died of the message, it was innocent."""
        self._record.end()
        if name in self._died_once:
            self._died_once.discard(name)
            self._outgoing.to_engine(Cleared(name))

    def accuse(self, owner: str) -> None:
        """Note who is to blame if the gateway ends now."""
        self._record.accuse(owner)
