"""The router's loop: clients on one side, replicas on the other, the same protocol on both.

One turn waits until something is ready, and then, in this order:

    handshakes      answer those that wait
    clients         what slow readers now take, then messages, in turns by account, for a few milliseconds
    replicas        pass on all that has come
    clock           every 0.1 s: states of the replicas, lost replicas, keepalives, a removed socket file
"""

import logging
import time
from collections.abc import Sequence

import zmq

from mgpu.orchestrator.gateway.front.account import account_of
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.front.inbox import GIVEN_UP, Inbox
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.front.socket import FrontSocket, Received, id_of
from mgpu.orchestrator.router.adopt import Adoption
from mgpu.orchestrator.router.agreement import Agreement
from mgpu.orchestrator.router.dispatch import Dispatch
from mgpu.orchestrator.router.questions import Questions
from mgpu.orchestrator.router.replica import Replica
from mgpu.orchestrator.router.requests.arrivals import Arrivals
from mgpu.orchestrator.router.requests.in_flight import InFlight
from mgpu.orchestrator.router.requests.routed_request import RoutedChoice, RoutedRequest
from mgpu.orchestrator.router.requests.table import RoutedTable
from mgpu.protocol.front.client_messages import (
    CancelRequest,
    Detokenize,
    Query,
    ResumeRequest,
    TakeBatches,
    Tokenize,
    parse_client_message,
)
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.framing import WireError
from mgpu.protocol.front.server_messages import Failed, Keepalive, Resumed, ServerMessage, to_map
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.process.bounded_log import BoundedLog

TURN_S = 0.004
QUANTUM_S = 0.0003
"""See `Inbox`: about ten messages."""
PERIOD_S = 0.1
KEEPALIVE_S = 1.0
MAX_REQUESTS = 65536

log = logging.getLogger(__name__)


class Router:
    """Owns the front socket and the connections to the replicas; one thread."""

    def __init__(
        self,
        front: FrontSocket,
        replicas: Sequence[Replica],
        names_accounts: bool = True,
        limits: ClientLimits | None = None,
    ) -> None:
        """``names_accounts``: the replicas are told whose request it is, which a key does not allow.

        ``limits`` hold for all replicas together; None: only each replica's own.
        """
        self.replicas = replicas
        self.table = RoutedTable(front, InFlight(limits))
        self.dispatch = Dispatch(replicas, self.table)
        self.questions = Questions(replicas, self.table, self.dispatch, front)
        self._front = front
        self._arrivals = Arrivals(names_accounts)
        self._adoption = Adoption(replicas, self.table, self.dispatch)
        self._inbox = Inbox(front, FairTurns[Received](), self._on_client, QUANTUM_S)
        self._agreement = Agreement()
        self._agreement.check(replicas)
        self._next_period_s = 0.0
        self._bug_log = BoundedLog(log, logging.ERROR)
        self._poller, self._polled = zmq.Poller(), list[object]()

    # ------------------------------------------------------------------- loop

    def turn(self, fds: Sequence[int] = (), wait_s: float = PERIOD_S) -> list[int]:
        """Wait for work, do it, and return those of ``fds`` that are readable."""
        ready = dict(self._poller_for(fds).poll(int(1000 * (0.0 if self._inbox else wait_s))))
        self._front.admit()
        self._front.flush()
        self._inbox.serve(TURN_S)
        self._send_to_replicas()
        self._front.connections.accept_more(self._inbox.is_behind)
        for replica in self.replicas:
            replica.receive()
        now_s = time.monotonic()
        self.questions.pass_on(now_s)
        self._drop_lost()
        if now_s >= self._next_period_s:
            self._next_period_s = now_s + PERIOD_S
            self._run_periodic_work(now_s)
        self._send_to_replicas()
        self._front.send_batches()
        return [fd for fd in fds if fd in ready]

    def _poller_for(self, fds: Sequence[int]) -> zmq.Poller:
        channels = [each.session.channel for each in self.replicas if each.session is not None]
        sockets = [socket for channel in channels for socket in (channel.socket, channel.monitor)]
        wanted = [self._front.socket, self._front.access.socket, self._front.connections.monitor, *sockets, *fds]
        if wanted != self._polled:
            self._poller, self._polled = zmq.Poller(), wanted
            for each in wanted:
                self._poller.register(each, zmq.POLLIN)
        return self._poller

    def _send_to_replicas(self) -> None:
        for replica in self.replicas:
            replica.send()

    def _run_periodic_work(self, now_s: float) -> None:
        for replica in self.replicas:
            replica.ask(now_s)
        self._agreement.check(self.replicas)
        self.dispatch.run_periodic_work(now_s)
        self._adoption.run_periodic_work(now_s)
        self.table.prune(now_s)
        self._front.restore_endpoint()
        for routed in self.table:
            if now_s - routed.last_sent_s >= KEEPALIVE_S:
                self.table.send(routed, Keepalive(routed.id))

    def stop(self, text: str) -> None:
        """End every request because the router stops."""
        self.questions.state = "stopped"
        for routed in self.table:
            self.dispatch.fail(routed, Refusal("stopped", text))
        self._front.flush()

    # ---------------------------------------------------------------- clients

    def _on_client(self, received: Received) -> None:
        """Handle a client's message; if something is wrong with it, its client is told and nothing else happens."""
        request_id = None
        try:
            data = self._front.unpack(received.frames)
            request_id = id_of(data)
            self._front.check(received)
            self._handle(received, data)
        except WireError as error:
            self._send(received.connection, Failed(None, error.code, str(error)))
        except FieldError as error:
            self._refuse(received.connection, request_id, Refusal("bad_request", str(error)))
        except Refusal as refusal:
            self._refuse(received.connection, request_id, refusal)
        except Exception as error:  # the border to clients: our own bug must cost one request, not the server
            self._bug_log.write("a client's message could not be handled", error=error)
            self._refuse(received.connection, request_id, Refusal("engine_error", "internal error in the router"))

    def _handle(self, received: Received, data: dict[object, object]) -> None:
        if data.get("type") == "generate":
            self._generate(received, data)
            return
        message = parse_client_message(data)
        if isinstance(message, ResumeRequest):
            self._resume(received, message)
        elif isinstance(message, Query):
            self.questions.answer(received.connection, message)
        elif isinstance(message, (Tokenize, Detokenize)):
            self._check_id(received.connection, message.id)
            self.questions.ask(received.connection, message, {str(name): value for name, value in data.items()})
        elif isinstance(message, TakeBatches):
            self._front.take_batches(received.connection)
        elif isinstance(message, CancelRequest):
            self._cancel(received.connection, message.id)

    def _generate(self, received: Received, data: dict[object, object]) -> None:
        fields = self._arrivals.parse(data)
        self._check_id(received.connection, fields["id"])
        if self.questions.state:
            raise Refusal("draining", "the server is finishing its last requests before it stops", RETRY_AFTER_S)
        if len(self.table) >= MAX_REQUESTS:
            raise Refusal("overloaded", f"{len(self.table)} requests are in flight", RETRY_AFTER_S)
        client = self._front.access.client_of(fields.get("account", ""), received.identity)
        account = account_of(received.identity, received.connection, received.owner, client)
        self.table.in_flight.check(account, fields.get("n", 1))
        routed = self._arrivals.request(received, account, data, fields)
        known = self.table.named(routed.session, routed.id) if routed.is_resumable else None
        if known is not None and known.ended_s is None:
            raise Refusal("duplicate_id", "a request with this id is in flight; choose another id")
        self.dispatch.begin(routed)

    def _resume(self, received: Received, message: ResumeRequest) -> None:
        connection = received.connection
        session, upstream_id = self._arrivals.names(received.identity, message.session, message.id)
        routed = self.table.named(session, message.id)
        if (same := self.table.get(connection, message.id)) is not None and same is not routed:
            raise Refusal("duplicate_id", "another request with this id is in flight; choose another id")
        if routed is None:
            self._adopt(received, message, session, upstream_id)
            return
        if len(message.offsets) != len(routed.choices):
            raise Refusal("bad_request", f"{len(message.offsets)} offsets do not fit {len(routed.choices)} choices")
        missing = [choice.since(at) for choice, at in zip(routed.choices, message.offsets, strict=True)]
        self.table.move(routed, connection)
        self._send(connection, Resumed(message.id, list(message.offsets)))
        for body in (routed.accepted_body, *(each for choice in missing for each in choice), routed.last):
            if body:
                self._front.send_body(connection, body)

    def _adopt(self, received: Received, message: ResumeRequest, session: str, upstream_id: int) -> None:
        choices = [RoutedChoice(first=max(0, at), finish_reason="stop" if at < 0 else None) for at in message.offsets]
        routed = RoutedRequest(
            received.connection, received.account, message.id, {}, session, upstream_id, True, None, choices
        )
        self._adoption.begin(routed, list(message.offsets))

    def _cancel(self, connection: bytes, request_id: int) -> None:
        routed = self.table.get(connection, request_id)
        if routed is None:
            self.questions.cancel(connection, request_id)
            return
        self._adoption.withdraw(routed)
        self.dispatch.cancel(routed)

    def _check_id(self, connection: bytes, request_id: int) -> None:
        if self.table.get(connection, request_id) is not None or self.questions.is_open(connection, request_id):
            raise Refusal("duplicate_id", "a request with this id is in flight; choose another id")

    def _refuse(self, connection: bytes, request_id: int | None, refusal: Refusal) -> None:
        """Answer a message that starts nothing; if its id is in flight, the answer must not end that request."""
        if request_id is not None and self.table.get(connection, request_id) is not None:
            refusal = Refusal(refusal.code, f"request {request_id}: {refusal}", refusal.retry_after_s)
            request_id = None
        self._send(connection, refusal.answer(request_id))

    def _drop_lost(self) -> None:
        """End the requests of connections that are gone, do not read what they are sent, or send too much."""
        for connection, loss in self._front.take_lost().items():
            for routed in self.table.of_connection(connection):
                self._adoption.withdraw(routed)
                self.dispatch.withdraw(routed)
                self.table.drop(routed)
            self.questions.cancel(connection)
            if loss != "gone":
                self._send(connection, GIVEN_UP[loss])

    def _send(self, connection: bytes, message: ServerMessage) -> None:
        self._front.send(connection, to_map(message))
