"""Everything known of one sequence while it lives: enough to start it again on another worker group."""

from array import array
from dataclasses import dataclass, field

from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.internal.gateway_messages import Submit
from mgpu.protocol.internal.worker_messages import NewRow, RowSampling


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence: what the client asked for, what was emitted, and where it stands on the workers.

    After a crash ``tokens`` (prompt and all emitted tokens) are prefilled again, and it goes on: the randomness of a
    token depends on ``sampling.seed`` and its position only.
    """

    sequence_id: int
    tokens: "array[int]"
    """Prompt, then every emitted token."""
    prompt_len: int
    max_len: int
    """Most tokens, prompt included; no step is planned that would choose a token past it."""
    stop_ids: frozenset[int]
    sampling: RowSampling
    cache_salt: bytes
    order: tuple[int, int]
    """(priority, arrival): of one account's waiting sequences the smallest runs first."""
    account: tuple[int, ...] = (0,)
    """Whose share of the server it counts to, as a path; see fair_queue.py."""
    weights: tuple[float, ...] = (1.0,)
    """The shares of the parts of that path."""
    token_cost: int = 1
    """What one of its tokens counts for; see `token_cost_of`."""
    submitted_s: float = 0.0
    """When it came, by the engine's clock."""

    row: int = -1
    """Row on the workers; -1 while it waits."""
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of its first full blocks, as far as they were needed."""
    sight: range = range(0)
    """Which of its blocks have pages for window layers, as far as it sees them; see window_pages.py."""
    num_registered: int = 0
    """How many of its first blocks are registered for reuse under their keys."""
    num_computed: int = 0
    """Tokens whose keys and values a published plan computes; out of date while it is in a decode batch."""
    state_slot: int = -1
    """Slot of the state that it starts from; -1: it starts from its first token."""
    save_points: list[int] = field(default_factory=list)
    """Ends of blocks at which its state will be copied, counted in blocks, the last one first; see snapshots.py."""
    saved_blocks: int = 0
    """Where the newest copy of its answer's state is whose key is not known yet; 0: there is none."""
    answer_key: bytes = b""
    """Key of the copy of its answer's state."""
    batch: int = -1
    """Index of its decode batch; -1 outside of one."""
    slot: int = -1
    """Index in the batch's columns."""
    rests: bool = False
    """It has a row and is in no step for a while; see resting.py."""
    due_tick: int = -1
    """Tick at which the batch must look at it again; see decode_batch.py."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache when it first ran."""
    turn: int = -1
    """How many sequences ran before it did; -1 before it first runs. The largest is preempted first."""
    finished: bool = False
    crashes: int = 0
    """Crashes of the workers in a row during which it was running."""

    @classmethod
    def from_submit(cls, submit: Submit, arrival: int, max_len: int) -> "Sequence":
        tokens = int32_array(submit.token_ids)
        return cls(
            sequence_id=submit.sequence_id,
            tokens=tokens,
            prompt_len=len(tokens) - submit.num_emitted,
            max_len=max_len,
            stop_ids=frozenset(submit.stop_token_ids),
            sampling=submit.sampling,
            cache_salt=submit.cache_salt,
            order=(submit.priority, arrival),
            account=tuple(submit.account),
            weights=tuple(submit.weights),
            token_cost=token_cost_of(submit.sampling),
        )

    def forget_workers(self) -> None:
        """Reset what mirrors the workers, as if it had never run; its tokens stay."""
        self.row = self.batch = self.slot = self.due_tick = -1
        self.rests = False
        self.blocks, self.sight = [], range(0)
        self.num_registered = self.num_computed = self.saved_blocks = 0
        self.save_points, self.answer_key = [], b""

    def to_new_row(self) -> NewRow:
        """Describe the sequence to the workers as it stands now."""
        return NewRow(
            self.row, self.tokens.tobytes(), self.prompt_len, list(self.blocks), self.sampling, self.state_slot
        )


def token_cost_of(sampling: RowSampling) -> int:
    """Return what choosing a token costs a step, in tokens that are chosen simply. An estimate.

    On a CPU, each of these takes about as long as computing the token. Log-probabilities have to travel too.
    """
    costs = (
        sampling.has_penalties,
        bool(sampling.logit_bias or sampling.banned_ids),
        sampling.grammar is not None,
        sampling.has_filters and not sampling.is_greedy,
        sampling.num_logprobs >= 0,
        sampling.num_logprobs > 0,
    )
    return 1 + sum(costs)
