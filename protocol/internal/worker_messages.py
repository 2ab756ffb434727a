"""Messages between the orchestrator and its workers.

Life of a worker: it reads its `WorkerSpec` from standard input, joins the group and loads (`LoadProgress`), reports
how much memory is left (`Loaded`), receives the size of the KV pool (`AllocateCache`), sends `Ready`, then executes one
`StepPlan` after another until `Shutdown`. A worker that fails sends `WorkerFailure` with its traceback and exits.

Every message carries the epoch of the worker group; messages of another epoch are ignored.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from mgpu.protocol.internal.codec import Codec
from mgpu.protocol.model.facts import ModelFacts, ModelSource
from mgpu.protocol.model.layout import Layout, StepLimits


@dataclass(frozen=True, slots=True)
class Joined:
    """How a worker that joins over tcp finds the orchestrator and the other ranks; see host_messages.py."""

    hosts: tuple[int, ...]
    """The number of each rank's host. Ranks of different hosts share no memory."""
    meeting: str
    """Name of the meeting of this epoch's ranks in the store at MASTER_ADDR, which may outlive an epoch."""
    opens_store: bool
    """This rank opens that store, unless the launcher has."""
    identity: bytes = b""
    """Routing id of the worker's socket."""
    secret: bytes = field(default=b"", repr=False)
    """Keys of the host's key file, as of `ClientKeys`."""
    server_key: bytes = b""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """The configuration of one worker. Its rank comes from RANK, LOCAL_RANK and WORLD_SIZE (torchrun's contract)."""

    epoch: int
    model: ModelSource
    facts: ModelFacts
    layout: Layout
    limits: StepLimits
    device: str
    """``cpu``, ``cuda`` (LOCAL_RANK picks the visible device) or ``cuda:N``."""
    endpoint: str
    """ipc endpoint of this worker's DEALER pair; tcp if it is ``joined``. The worker connects."""
    rendezvous: str
    """``file://…`` for one machine; empty: MASTER_ADDR and MASTER_PORT of an outside launcher."""
    shared_fd: int
    """Inherited memfd of ``shared_bytes`` for shared-memory transports, the same file in every rank; -1: none."""
    shared_bytes: int
    num_threads: int
    """CPU threads of torch in this worker; 0: leave torch's default."""
    memory_fraction: float
    """Share of the device's memory that weights, activations and KV cache may take together (CUDA)."""
    kv_memory: int
    """Bytes of this rank's KV pool; 0: measure what is free (CUDA) or use the CPU default."""
    seed: int
    """Seed of the random weights of ``load_format`` dummy."""
    worker_timeout_s: float
    """Longest wait for a peer rank before the worker gives up."""
    joined: Joined | None = None
    """Set if an outside launcher has started the ranks, on one host or several."""
    captures_library: bool = True
    """Whether sums of NCCL may be part of CUDA graphs. Not after workers have hung: NCCL's kernels have no deadline."""

    @property
    def ranks_here(self) -> int:
        """Most ranks that any one machine has."""
        if self.joined is None:
            return self.layout.placement.world_size
        return max(map(self.joined.hosts.count, self.joined.hosts))


@dataclass(frozen=True, slots=True)
class LoadProgress:
    epoch: int
    rank: int
    phase: str
    """spawn, rendezvous, weights, cache or warmup."""
    done_bytes: int
    total_bytes: int
    elapsed_s: float
    """Seconds since the phase began."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights are loaded. ``num_blocks`` is the number of KV blocks that this rank could hold."""

    epoch: int
    rank: int
    num_blocks: int
    block_bytes: int
    weight_bytes: int
    free_bytes: int
    num_pages: int = 0
    """How many of them its window layers could keep; 0, on all ranks: all."""


@dataclass(frozen=True, slots=True)
class AllocateCache:
    """Allocate the pools: the same number of blocks on every rank, the minimum of the reported ones, and of pages."""

    epoch: int
    num_blocks: int
    num_pages: int = 0
    """Blocks that window layers keep; 0: all."""


@dataclass(frozen=True, slots=True)
class Ready:
    epoch: int
    rank: int
    phase_s: dict[str, float]
    """Seconds per phase, in order."""
    loaded_bytes: int
    """Bytes read from disk by this rank."""
    notes: list[str]
    """Lines for the start-up log, such as the one about staging through host memory."""
    step_tokens: int = 1
    """Prompt tokens of the trial step at start."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of every token, from which workers know what a grammar allows.

    The orchestrator sends it before the first row with a grammar. Servers that never see one never have it.
    """

    epoch: int
    tokens: list[bytes]
    """By token id. Empty for ids that stand for no text."""
    special_ids: list[int]
    """Tokens that are no text, though they have bytes: no grammar means them when it means these bytes."""


@dataclass(frozen=True, slots=True)
class RowGrammar:
    """What the text of a row's answer must be."""

    text: str
    """A grammar of llguidance, which the gateway has checked."""
    stop_ids: list[int]
    """Can be chosen where the text is complete, and nowhere else. At least one."""


@dataclass(frozen=True, slots=True)
class LogitBias:
    """What is added to the logits of some tokens. Packed: a client may send a thousand for each of 128 choices."""

    token_ids: bytes
    """Little-endian int32."""
    values: bytes
    """As many little-endian float32."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, float]]) -> "LogitBias | None":
        """Pack pairs of token id and value; None if there are none."""
        if not pairs:
            return None
        token_ids, values = zip(*pairs, strict=True)
        return cls(array("i", token_ids).tobytes(), array("f", values).tobytes())


GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row's next token is chosen. Neutral values switch a rule off (ranges: front/client_messages.py)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """64 bits; with the position of the token it determines the randomness."""
    logit_bias: LogitBias | None = None
    num_logprobs: int = -1
    """-1: none; 0: of the chosen token; N: of the N likeliest too."""
    banned_until: int = 0
    """``banned_ids`` cannot be chosen for positions below this one (min_tokens)."""
    banned_ids: list[int] | None = None
    grammar: RowGrammar | None = None

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is chosen; no noise is added."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """True if tokens that the row already has become less likely."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def has_rules(self) -> bool:
        """True if logits may be changed before a token is chosen."""
        return self.logit_bias is not None or bool(self.banned_ids) or self.has_penalties

    @property
    def has_filters(self) -> bool:
        """True if unlikely tokens may be excluded."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def needs_all_logits(self) -> bool:
        """True if the token, or its log-probabilities, depend on more than the best logit of each rank."""
        return self.num_logprobs >= 0 or (not self.is_greedy and self.has_filters)

    @property
    def is_simple(self) -> bool:
        """True if the token is the arg-max of the row's logits, with or without noise."""
        return not self.has_rules and not self.needs_all_logits and self.grammar is None


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request takes a row: all of its known tokens (prompt, then emitted), its blocks and its sampling."""

    row: int
    token_ids: bytes
    """Little-endian int32."""
    prompt_len: int
    """How many of them are prompt. Penalties on presence and frequency count only the others."""
    block_ids: list[int]
    sampling: RowSampling
    state_slot: int = -1
    """The state of linear layers that it starts from; -1: none, its first token is computed first."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, the same bytes to every worker. Workers keep rows between steps, so only changes are sent.

    Order of effects: states saved, ``free_rows``, ``new_rows``, appended blocks, then compute. ``rows``, ``starts``,
    ``counts`` and ``samples`` are columns of one table: row r computes positions [start, start + count) and, where its
    ``samples`` is 1, chooses the token at position start + count, which the worker writes into the row itself (the next
    plan may use it before the orchestrator has seen it). Steps run in order; a block freed by one plan may be given
    to another row by the next.
    With S pipeline stages, a row that sampled in step n is not planned again before step n + S.
    """

    epoch: int
    step: int
    free_rows: list[int]
    new_rows: list[NewRow]
    block_rows: list[int]
    block_ids: list[int]
    """Appended blocks, pairwise: ``block_ids[i]`` is appended to row ``block_rows[i]``."""
    rows: list[int]
    starts: list[int]
    counts: list[int]
    samples: list[int]
    save_rows: list[int] = field(default_factory=list)
    save_slots: list[int] = field(default_factory=list)
    """Before this step the state of row ``save_rows[i]`` in linear layers is copied to slot ``save_slots[i]``,
    one after the other."""
    page_blocks: list[int] = field(default_factory=list)
    page_ids: list[int] = field(default_factory=list)
    """From this step on, window layers keep block ``page_blocks[i]`` in page ``page_ids[i]``. Each block is there once;
    a page may have been that of another block before, which no row sees any more."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of the model's raw distribution at one position."""

    chosen: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the output rank sampled: one token per row whose ``samples`` was 1, in plan order.

    Sent for every plan that has rows, also when none of them samples: results pace the orchestrator.
    """

    epoch: int
    step: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None
    """Parallel to ``token_ids``; None if no row asked for them."""
    compute_us: int
    """Time in the worker from reading the plan to having the tokens."""
    failures: list[tuple[int, str]] | None = None
    """Rows whose grammar cannot go on: an index into ``token_ids``, and why. Their token has no meaning."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Finish the current step, release the device, exit with 0."""

    epoch: int


@dataclass(frozen=True, slots=True)
class StaySpinning:
    """A step may follow soon: poll for it for a moment instead of sleeping."""

    epoch: int


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """The worker cannot go on; it exits non-zero after this."""

    epoch: int
    rank: int
    phase: str
    message: str
    """One line that a user can act on."""
    traceback: str
    at_s: float
    """CLOCK_MONOTONIC of the failure, to order failures of several ranks."""
    is_mistake: bool = False
    """The model's files or the options are at fault, not mgpu: no traceback, and starting again does not help."""
    in_capture: bool = False
    """A sum of NCCL in a CUDA graph did not end: workers without such graphs may live."""


CONTROL = Codec(
    WorkerSpec, LoadProgress, Loaded, AllocateCache, Ready, StepPlan, StepResult, StaySpinning, Shutdown, WorkerFailure,
    Vocabulary,
)  # fmt: skip
"""Encoder and decoder of everything on a worker's socket and on its standard input."""
