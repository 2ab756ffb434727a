"""Collect the tokens and endings of one turn of the engine for the gateway, and count them."""

from dataclasses import dataclass

from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.protocol.internal.gateway_messages import Outputs
from mgpu.protocol.internal.worker_messages import TokenLogprobs


@dataclass(slots=True)
class StepCounters:
    """Totals since the start, under the names and in the order that clients see."""

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    discarded_tokens: int = 0
    finished: int = 0
    preemptions: int = 0
    steps: int = 0
    replays: int = 0


class StepOutputs:
    """Columns of the next `Outputs`."""

    def __init__(self) -> None:
        self._columns = Outputs([], [], [], [], [], [])

    def add_end(self, sequence_id: int, finish: str, error: str = "", cached_tokens: int = 0) -> None:
        """Add an ending without a token: a cancellation, a failure, a refusal."""
        columns = self._columns
        columns.sequence_ids.append(sequence_id)
        columns.token_ids.append([])
        columns.logprobs.append([])
        columns.finish.append(finish)
        columns.errors.append(error)
        columns.cached_tokens.append(cached_tokens)

    def add_waits(self, queue_s: dict[int, float]) -> None:
        """Add how long sequences had waited until they began to run."""
        self._columns.queue_s.update(queue_s)

    def add_tokens(
        self, seqs: list[Sequence], token_ids: list[int], finish: list[str], logprobs: list[list[TokenLogprobs]] | None
    ) -> None:
        """Add one token to each of many sequences. ``logprobs``: None if no sequence asked."""
        columns = self._columns
        columns.sequence_ids.extend([seq.sequence_id for seq in seqs])
        columns.token_ids.extend([[token] for token in token_ids])
        columns.logprobs.extend([[] for _ in seqs] if logprobs is None else logprobs)
        columns.finish.extend(finish)
        columns.errors.extend([""] * len(seqs))
        columns.cached_tokens.extend([seq.cached_tokens for seq in seqs])

    def take(self) -> Outputs | None:
        """Return what was collected since the last call; None when nothing was."""
        columns = self._columns
        if not columns.sequence_ids:
            return None
        self._columns = Outputs([], [], [], [], [], [])
        return columns
