"""The part of a gateway that resumes requests. The test is its clients and its engine, one message at a time."""

from collections.abc import Sequence
from typing import Any, cast

from mgpu.orchestrator.gateway.front.account import Account, account_of
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.front.socket import Received
from mgpu.orchestrator.gateway.requests.admission import ServedModel
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.orchestrator.gateway.requests.queries import Queries
from mgpu.orchestrator.gateway.requests.quota import Quota
from mgpu.orchestrator.gateway.requests.request import Choice, Request
from mgpu.orchestrator.gateway.requests.request_handler import RequestHandler
from mgpu.orchestrator.gateway.requests.request_times import RequestTimes
from mgpu.orchestrator.gateway.requests.resume import Resumptions
from mgpu.orchestrator.gateway.requests.resume_context import pack_context
from mgpu.orchestrator.gateway.requests.table import RequestTable
from mgpu.protocol.front.client_messages import Generate, ResumeRequest
from mgpu.protocol.front.fields import int32_bytes
from mgpu.protocol.front.server_messages import Accepted, ServerMessage, Tokens
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import (
    Cancel,
    EngineInfo,
    GatewaySpec,
    RecordQuery,
    RecordReply,
    SequenceRecord,
)

SPEC = GatewaySpec("", "", "", "", "safetensors", "tiny", 300, [], 1 << 20)
INFO = EngineInfo("ready", 512, 4096, "")
KEEP_S = 30.0
A, B = b"connection A", b"connection B"
KEY = "key:someone"
SIZE, ACCOUNT = 5000, Account(KEY, KEY)


class ResumingGateway:
    """Everything that it sends is kept. Keys in ``revoked`` are refused."""

    def __init__(self, **limits: int) -> None:
        self.sent: list[tuple[bytes, ServerMessage]] = []
        self.sent_to_engine: list[Any] = []
        self.revoked: set[str] = set()
        self.quota = Quota(ClientLimits(**limits))  # type: ignore[arg-type]
        self.table = RequestTable(self.quota)
        model, outgoing, access = ServedModel(SPEC, INFO, is_loaded=True), cast("Outgoing", self), cast("Any", self)
        self.queries = Queries(model, self.table, outgoing, RequestTimes())
        self.turns: FairTurns[Received] = FairTurns()
        self.resumptions = Resumptions(RequestHandler(model, self.table, outgoing), access, outgoing, self.turns)

    def to_client(self, connection: bytes, message: ServerMessage) -> None:
        self.sent.append((connection, message))

    def to_engine(self, message: object) -> None:
        self.sent_to_engine.append(message)

    def check(self, identity: str) -> None:
        if identity in self.revoked:
            raise Refusal("not_allowed", "its key is no longer on the list")

    def resume(
        self, client: bytes, session: str = "s", offsets: tuple[int, ...] = (0,), account: Account | None = None
    ) -> None:
        """Let a client ask for request 1 of a session."""
        message = ResumeRequest(1, session, offsets)
        self.resumptions.resume(client, account or account_of("uid:0", client, "pid:1"), message)

    def answer(self, at: int, *records: SequenceRecord) -> None:
        """Let the engine answer the question that it was asked as number ``at``."""
        question = self.questions[at]
        self.resumptions.on_record(RecordReply(question.query_id, context(len(records)), list(records)))

    @property
    def questions(self) -> list[RecordQuery]:
        return [message for message in self.sent_to_engine if isinstance(message, RecordQuery)]

    def tokens(self, client: bytes) -> list[int]:
        """Return the token ids that a client was sent, of all choices."""
        sent = [message for to, message in self.sent if to == client and isinstance(message, Tokens)]
        return [token for message in sent for token in message.token_ids]

    def heard(self, client: bytes) -> list[str]:
        """Return the types, or codes, of the messages that a client was sent."""
        return [getattr(message, "code", type(message).__name__.lower()) for to, message in self.sent if to == client]

    @property
    def cancelled(self) -> list[int]:
        return [message.sequence_id for message in self.sent_to_engine if isinstance(message, Cancel)]


def new_choice(spec: Generate, index: int, sequence_id: int, stop_ids: Sequence[int]) -> Choice:
    return Choice(index, sequence_id, frozenset(stop_ids), None, None)


def context(n: int) -> bytes:
    """Return what an earlier gateway has left with the engine."""
    spec = Generate(1, n=n, session="s", keep_s=KEEP_S)
    return pack_context(Request(b"", spec, 0.0, None, KEY, KEY, size=SIZE), Accepted(1, "tiny", 3, 16, 0))


def record(sequence_id: int = 7, tokens: Sequence[int] = (5, 6), finish: str = "", error: str = "") -> SequenceRecord:
    return SequenceRecord(sequence_id, [], len(tokens), int32_bytes(list(tokens)), b"", -1, finish, error, 0)


def portion(tokens: Sequence[int], num_tokens: int, finish: str = "", sequence_id: int = 7) -> SequenceRecord:
    return SequenceRecord(sequence_id, [], num_tokens, int32_bytes(list(tokens)), b"", -1, finish, "", 0)
