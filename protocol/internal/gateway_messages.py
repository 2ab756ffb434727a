"""Messages between the gateway process and the engine in the orchestrator; `Outputs` has all news of one turn."""

from dataclasses import dataclass, field

from mgpu.protocol.front.server_messages import FailureCode
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.codec import Codec
from mgpu.protocol.internal.worker_messages import RowSampling, TokenLogprobs, Vocabulary
from mgpu.protocol.model.facts import CheckpointFormat
from mgpu.protocol.model.sampling import SamplingDefaults


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """The keys for tcp: the server's own secret key, and the public keys of the clients that may connect."""

    secret: bytes = field(repr=False)
    clients: list[bytes]
    """32 bytes each."""


@dataclass(frozen=True, slots=True)
class GatewaySpec:
    """The configuration of the gateway process. It comes on standard input, whose end means that the parent is gone."""

    runtime_dir: str
    bind: str
    """Front endpoint: ``ipc://…`` or ``tcp://127.0.0.1:PORT``."""
    link: str
    """ipc endpoint of the DEALER pair to the engine; the engine binds, the gateway connects."""
    model_path: str
    model_format: CheckpointFormat
    """Decides where the tokenizer and chat template are."""
    model_name: str
    vocab_size: int
    eos_token_ids: list[int]
    max_request_bytes: int
    first_sequence: int = 1
    """Number of the first sequence. A gateway that replaces another must not use its numbers again."""
    info: "EngineInfo | None" = None
    """For a gateway that replaces another: the state of the running engine. The gateway binds when it can serve."""
    keys: ServerKeys | None = None
    """None: only ipc, and tcp on the loopback without encryption."""
    own_key: bytes = b""
    """Public key of the HTTP process, which speaks for several clients; empty where there are no keys."""
    limits: ClientLimits = field(default_factory=ClientLimits)
    memory_bytes: int = 0
    """How much the process may grow; 0: as much as the limits need."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """For requests that do not say."""
    tool_format: str = "auto"
    """A name of `chat.formats.TOOL_FORMAT_NAMES`; auto: as the chat template shows it."""
    reasoning_format: str = "auto"
    sends_wake_up: bool = False
    """True if the engine wants `WakeUp`."""
    prepares_text: bool = False
    """Load the tokenizer in the processes for text as soon as the server is ready, not when they are first needed."""
    logs_requests: bool = False
    """Log a line for each request that ends."""
    record_fd: int = -1
    """Inherited descriptor of the `work_record.WorkRecord`; -1: nobody reads it."""
    shut_out: dict[str, float] = field(default_factory=dict)
    """Owners of connections that are not let in, and for how many seconds: gateways have died of their input."""
    died_once: list[bytes] = field(default_factory=list)
    """Names of messages that an earlier gateway has died of: `Cleared` is wanted if this one handles them."""
    died_twice: list[bytes] = field(default_factory=list)
    """Names of messages to refuse."""


@dataclass(frozen=True, slots=True)
class GatewayReady:
    """The front channel is bound. ``endpoint`` is what clients connect to (a tcp port 0 is resolved)."""

    endpoint: str


@dataclass(frozen=True, slots=True)
class GatewayFailure:
    message: str
    traceback: str
    caused_by_clients: bool = False
    """Clients caused it and may do so again, so it does not count towards the limit of restarts."""
    is_mistake: bool = False
    """The model's files are at fault; starting again does not help."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Limits and state of the engine, sent whenever the state changes."""

    state: str
    """starting, ready, recovering (requests wait for new workers), draining or stopped."""
    max_seq_len: int
    kv_tokens: int
    """Tokens that the KV pool holds."""
    layout: str
    """The layout table of the start-up log, for people."""


@dataclass(frozen=True, slots=True)
class StateKnown:
    """From the gateway: it has received the `EngineInfo` with this state and acts on it."""

    state: str


@dataclass(frozen=True, slots=True)
class Submit:
    """One sequence to generate. The gateway has checked every number and expanded ``n``."""

    sequence_id: int
    """Chosen by the gateway, never reused."""
    token_ids: bytes
    """Little-endian int32, at least one token."""
    max_tokens: int
    stop_token_ids: list[int]
    """With the end-of-sequence ids, unless the request ignores them."""
    sampling: RowSampling
    cache_salt: bytes
    """Prefix blocks are shared only between requests of the same salt."""
    priority: int
    """Lower runs first of the requests of one account; equal priorities in order of arrival."""
    account: list[int] = field(default_factory=lambda: [0])
    """Whose share of the server it counts to, as a path: requests that wait take turns by its first number, among those
    by the second, and so on. The last number of a path is not in the middle of another."""
    weights: list[float] = field(default_factory=lambda: [1.0])
    """For each part of the path, its share while others wait too."""
    num_emitted: int = 0
    """How many of the last ``token_ids`` are no prompt but the beginning of the answer, emitted by another server."""


@dataclass(frozen=True, slots=True)
class Resumable:
    """All sequences of a request that another gateway may have to continue. All of them arrive or none."""

    session: str
    request_id: int
    """With the session it names the request; both are chosen by the client."""
    context: bytes
    """What a gateway must know to continue the request; opaque to the engine."""
    submits: list[Submit]


@dataclass(frozen=True, slots=True)
class RecordQuery:
    """Ask for a portion of what the engine knows of a request.

    Once a portion completes every sequence, the `Outputs` that follow it continue them.
    """

    query_id: int
    session: str
    request_id: int
    known: list[int] = field(default_factory=list)
    """Per choice: tokens in earlier portions, -1 if no more are wanted; empty: none yet."""
    offsets: list[int] = field(default_factory=list)
    """Per choice: how many of its first tokens come without log-probabilities, -1 for all; empty: with all of them."""


@dataclass(slots=True)
class SequenceRecord:
    """A portion of one sequence as it is now."""

    sequence_id: int
    """The gateway's number, as in `Submit`."""
    stop_token_ids: list[int]
    num_tokens: int
    """All emitted tokens."""
    token_ids: bytes
    """Tokens that follow the known ones, as many as fit; little-endian int32."""
    logprobs: bytes
    """Log-probabilities of the last of these tokens, packed with ``num_top``; empty if not asked for."""
    num_top: int
    """See `packed_logprobs.LogprobPacking`."""
    finish: str
    """Finish reason of the whole sequence, or empty; ``error`` likewise."""
    error: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class RecordReply:
    query_id: int
    context: bytes
    sequences: list[SequenceRecord]
    """One per choice; empty when the request is not known."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a sequence; ``reason`` becomes its finish reason. An unknown id is ignored."""

    sequence_id: int
    reason: str
    """cancelled, or stop when the gateway found a stop string."""


@dataclass(frozen=True, slots=True)
class StatsQuery:
    query_id: int


@dataclass(frozen=True, slots=True)
class StatsReply:
    query_id: int
    counters: dict[str, float]
    """running, waiting, kv_blocks_total, kv_blocks_used, prompt_tokens, generated_tokens, steps, preemptions,
    prefix_hit_tokens, last_step_age_s, uptime_s, …"""


DUPLICATE = "a request of this session and id is running; resume it, or choose another id"
DRAINING = "the server is finishing its last requests before it stops"
REFUSALS: dict[str, FailureCode] = {DUPLICATE: "duplicate_id", DRAINING: "draining"}
"""Errors of `Outputs` with which the engine refuses what the gateway could not know to be in vain, and their codes."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """All tokens and endings since the last one, as parallel columns: mostly one message per turn of the engine.

    ``finish[i]`` is empty while the sequence runs, else stop, length, cancelled or error. Every submitted sequence gets
    exactly one non-empty ``finish``.
    """

    sequence_ids: list[int]
    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs]]
    """Per sequence, parallel to its new tokens; empty if not asked for."""
    finish: list[str]
    errors: list[str]
    """Per sequence: the text for the client if ``finish`` is error, else empty."""
    cached_tokens: list[int]
    """Per sequence: prompt tokens taken from the prefix cache; meaningful with the first token."""
    queue_s: dict[int, float] = field(default_factory=dict)
    """Sequences whose first step has gone out since the last message: how long each had waited."""


@dataclass(frozen=True, slots=True)
class Reload:
    """New keys and limits for a running server, after SIGHUP made the orchestrator read its files again."""

    client_keys: list[bytes] | None
    """The clients that may connect from now on, as in `ServerKeys`; None on a server without keys."""
    limits: ClientLimits


@dataclass(frozen=True, slots=True)
class Ping:
    """From the engine, about once a second. The gateway answers with `Alive`."""


@dataclass(frozen=True, slots=True)
class WakeUp:
    """From the gateway: an idle server has received something. The engine wakes up while the gateway reads it."""


@dataclass(frozen=True, slots=True)
class Floods:
    """From the gateway: whose messages take more than a small part of its time now. Sent when that has changed."""

    owners: list[int]
    """The first numbers of accounts, as in `Submit`."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """From the gateway: it has handled a message that an earlier gateway had died of."""

    name: bytes


@dataclass(frozen=True, slots=True)
class Alive:
    """From the gateway: its loop runs, it has read something. Sent at most every `ALIVE_INTERVAL_S`."""


ALIVE_INTERVAL_S = 0.5

LINK = Codec(
    GatewaySpec,
    GatewayReady,
    GatewayFailure,
    EngineInfo,
    Submit,
    Cancel,
    StatsQuery,
    StatsReply,
    Outputs,
    Resumable,
    RecordQuery,
    RecordReply,
    Reload,
    Ping,
    Alive,
    StateKnown,
    WakeUp,
    Floods,
    Cleared,
    Vocabulary,
)
