"""What clients send: in turns by account, a few milliseconds at a time, at a pace that leaves time to the streams."""

import logging
import os
import time
from collections.abc import Mapping

from mgpu.orchestrator.gateway.front.access import scope_to_key
from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.front.inbox import GIVEN_UP, Inbox
from mgpu.orchestrator.gateway.front.pace import CANCEL_S, CONNECTION_S, Modest, Pace, share_beside_streams
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.front.socket import FrontSocket, Received, id_of
from mgpu.orchestrator.gateway.requests.admission import ServedModel
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.orchestrator.gateway.requests.prompts import Prompts
from mgpu.orchestrator.gateway.requests.queries import Queries
from mgpu.orchestrator.gateway.requests.quota import account_number
from mgpu.orchestrator.gateway.requests.request_handler import RequestHandler
from mgpu.orchestrator.gateway.requests.resume import Resumptions
from mgpu.orchestrator.gateway.suspects import Suspects
from mgpu.orchestrator.gateway.text.chat_template import ChatTemplateError
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.text_queries import as_request
from mgpu.protocol.front.client_messages import (
    CancelRequest,
    Detokenize,
    Generate,
    ResumeRequest,
    TakeBatches,
    Tokenize,
    parse_client_message,
)
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.framing import WireError
from mgpu.protocol.front.server_messages import Failed
from mgpu.protocol.internal.gateway_messages import Floods
from mgpu.protocol.internal.process.bounded_log import BoundedLog

TURN_S = 0.004
"""How long messages are handled before the engine is looked at again."""
FLUSH_INTERVAL_S = 0.005

log = logging.getLogger(__name__)


class Clients:
    """Hands every message of a client to what it is for, and ends the requests of clients that are lost."""

    def __init__(
        self,
        front: FrontSocket,
        turns: FairTurns[Received],
        requests: RequestHandler,
        model: ServedModel,
        prompts: Prompts,
        queries: Queries,
        resumptions: Resumptions,
        outgoing: Outgoing,
        suspects: Suspects,
    ) -> None:
        self._front = front
        self._turns = turns
        self._requests = requests
        self._table = requests.table
        self._model = model
        self._prompts = prompts
        self._queries = queries
        self._resumptions = resumptions
        self._outgoing = outgoing
        self._suspects = suspects
        self._pace = Pace(share=share_beside_streams(len(os.sched_getaffinity(0))))
        self._modest = Modest()
        self._told_floods: list[int] = []
        self._inbox = Inbox(front, turns, self._on_client, charge=self._modest.charge)
        self._next_flush_s = 0.0
        self._lost_log, self._bug_log = BoundedLog(log, logging.INFO), BoundedLog(log, logging.ERROR)

    @property
    def has_messages(self) -> bool:
        """Whether messages have been read and wait for their turn."""
        return bool(self._inbox)

    def wait_s(self) -> float:
        """Return how long messages have to wait for the sake of the requests that run; 0 if they need not."""
        wait_s = self._pace.wait_s() if len(self._table) else 0.0
        return min(wait_s, self._modest.wait_s()) if wait_s else 0.0

    def serve(self) -> None:
        """Handle messages, the account that has cost the least first, until the time of this turn is over.

        Whatever clients send, the loop is back at the engine's messages in a few milliseconds.
        """
        began_s = time.monotonic()
        if began_s >= self._next_flush_s:
            self._next_flush_s = began_s + FLUSH_INTERVAL_S
            self._front.flush()
        if not len(self._table):
            self._inbox.serve(TURN_S)
            self._take_cost_s()
        elif self._pace.wait_s() == 0:
            self._inbox.serve(min(TURN_S, self._pace.left_s()))
            self._pace.spend(time.monotonic() - began_s + self._take_cost_s())
        elif self._modest.wait_s() == 0:
            self._inbox.serve(TURN_S, self._modest.has)
            self._modest.spend(time.monotonic() - began_s + self._take_cost_s())
        else:
            self.drop_lost()
            return
        self._front.connections.accept_more(self._inbox.is_behind)
        self.drop_lost()

    def charge(self, costs: Mapping[Account, float]) -> None:
        """Charge accounts for work that their messages have brought about later: seconds of this process."""
        for account, cost_s in costs.items():
            self._turns.charge_beside(account.path, cost_s)
            self._modest.charge(account.owner, cost_s)
            if len(self._table):
                self._pace.spend(cost_s)

    def tell_floods(self) -> None:
        """Tell the engine whose messages take much time, if that has changed."""
        floods = sorted(map(account_number, self._modest.floods()))
        if floods != self._told_floods:
            self._told_floods = floods
            self._outgoing.to_engine(Floods(floods))

    def _take_cost_s(self) -> float:
        """Return what libzmq has done for what was read and for new connections since the last call."""
        return self._front.take_receiving_s() + CONNECTION_S * self._front.connections.take_accepted()

    def _on_client(self, received: Received) -> None:
        """Handle a client's message; if something is wrong with it, its client is told and nothing else happens."""
        connection, request_id = received.connection, None
        name = self._suspects.begin(received.owner, received.frames)
        try:
            data = self._front.unpack(received.frames)
            request_id = id_of(data)
            self._suspects.check(name)
            self._front.check(received)
            self._handle(received, data)
        except WireError as error:
            self._outgoing.to_client(connection, Failed(None, error.code, str(error)))
        except (FieldError, TokenizerError, ChatTemplateError) as error:
            self._requests.refuse(connection, request_id, Refusal("bad_request", str(error)))
        except Refusal as refusal:
            self._requests.refuse(connection, request_id, refusal)
        except Exception as error:  # the border to clients: our own bug must cost one request, not the server
            self._bug_log.write("a client's message could not be handled", error=error)
            self._requests.refuse(connection, request_id, Refusal("engine_error", "internal error in the gateway"))
        finally:
            self._suspects.end(name)

    def _handle(self, received: Received, data: dict[object, object]) -> None:
        connection, account = received.connection, received.account
        message = scope_to_key(parse_client_message(self._model.with_defaults(data)), received.identity)
        if isinstance(message, Generate):
            client = self._front.access.client_of(message.account, received.identity, received.owner)
            received = received._replace(client=client)
            self._prompts.encode(self._requests.begin(received, message), self._model.codec)
        elif isinstance(message, (Tokenize, Detokenize)):
            self._prompts.encode(self._requests.begin(received, as_request(message), message), self._model.codec)
        elif isinstance(message, ResumeRequest):
            self._resumptions.resume(connection, account, message)
        elif isinstance(message, TakeBatches):
            self._front.take_batches(connection)
        elif not isinstance(message, CancelRequest):
            self._queries.on_query(connection, account, message)
        elif (request := self._table.get(connection, message.id)) is not None:
            self._pace.spend(CANCEL_S)
            self._modest.charge(account.owner, CANCEL_S)
            self._requests.cancel(request)
        else:
            self._resumptions.cancel(connection, account, message.id)

    def drop_lost(self) -> None:
        """End the requests of connections that are gone, do not read what they are sent, or send too much."""
        for connection, loss in self._front.take_lost().items():
            requests = self._table.of_connection(connection)
            self._lost_log.write("client %s is %s; %d requests end", connection.hex(), loss, len(requests))
            self._pace.spend(CANCEL_S * len(requests))
            for request in requests:
                if not self._resumptions.keep(request):
                    self._requests.drop(request)
            if loss != "gone":
                self._outgoing.to_client(connection, GIVEN_UP[loss])
