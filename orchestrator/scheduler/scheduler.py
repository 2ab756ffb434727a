"""Keep all live sequences from their arrival to their one ending: the scheduler as the engine sees it.

The scheduler and the workers know sequences only. A request with n = 3 is three sequences.

Continuous batching over a paged KV cache, for a pipeline of any depth. Pure bookkeeping on integers: no clock, no
socket, no torch. step_planner.py decides what a step computes.
"""

from dataclasses import replace

from mgpu.orchestrator.scheduler.block_tables import BlockTables
from mgpu.orchestrator.scheduler.crash_suspects import note_crash
from mgpu.orchestrator.scheduler.limits import Limits, RequestRefused, checked_sequence
from mgpu.orchestrator.scheduler.outputs import StepCounters, StepOutputs
from mgpu.orchestrator.scheduler.running_shares import RunningShares
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.orchestrator.scheduler.step_planner import StepPlanner
from mgpu.orchestrator.scheduler.waiting import WaitingLine
from mgpu.protocol.internal.gateway_messages import Outputs, Submit
from mgpu.protocol.internal.worker_messages import StepPlan, StepResult, TokenLogprobs
from mgpu.protocol.model.kv_pools import PoolSize


class Scheduler:
    """All live sequences and the steps in flight. One call per event; every sequence ends in exactly one output."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.counters = StepCounters()
        self._first_max_seq_len = limits.max_seq_len
        self._arrivals = 0
        self._live: dict[int, Sequence] = {}
        self._waiting = WaitingLine()
        self._outputs = StepOutputs()
        self.shares = RunningShares()
        self.shares.num_waiting, self.shares.in_line = self._waiting.num_new_of, self._waiting.new_owners
        self._waiting.lacks = self.shares.lacks
        self._planner = StepPlanner(limits, self._waiting, self.counters, self.shares, epoch=0, next_step=0)

    # -- what the engine asks ------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_running(self) -> int:
        return len(self._planner.admitted)

    @property
    def num_in_flight(self) -> int:
        return len(self._planner.in_flight)

    @property
    def blocks(self) -> BlockTables:
        return self._planner.blocks

    def find(self, sequence_id: int) -> Sequence | None:
        """Return a live sequence; None for any other id."""
        return self._live.get(sequence_id)

    def live_ids(self) -> list[int]:
        return list(self._live)

    def take_outputs(self) -> Outputs | None:
        """Return what happened since the last call; None when nothing did."""
        return self._outputs.take()

    def check_integrity(self) -> None:
        """Prove that blocks and rows add up. AssertionError if not; cheap enough for an idle moment."""
        self._planner.check_integrity()
        if not self._live:
            assert self.blocks.pool.num_free == self.limits.num_blocks, "blocks are held without a sequence"

    # -- events --------------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit, now_s: float = 0.0) -> None:
        """Queue a sequence; one that can never run is answered with an error now."""
        if submit.sequence_id in self._live:
            return  # every id has one ending, and the gateway never reuses an id
        try:
            seq = checked_sequence(submit, self._arrivals, self.limits)
        except RequestRefused as refusal:
            self._outputs.add_end(submit.sequence_id, "error", str(refusal))
            return
        seq.submitted_s = now_s
        self._arrivals += 1
        self._live[seq.sequence_id] = seq
        self._waiting.join(seq)

    def refuse(self, sequence_id: int, error: str) -> None:
        """Answer a sequence that will not be queued, with its one ending."""
        if sequence_id not in self._live:
            self._outputs.add_end(sequence_id, "error", error)

    def cancel(self, sequence_id: int, reason: str) -> None:
        """End a sequence now, wherever it stands; unknown ids are ignored."""
        seq = self._live.get(sequence_id)
        if seq is not None:
            self._finish(seq)
            self._outputs.add_end(sequence_id, reason, cached_tokens=seq.cached_tokens)

    def fail_all(self, error: str) -> None:
        """End every live sequence with an error."""
        for seq in list(self._live.values()):
            self._fail(seq, error)

    def schedule(self) -> StepPlan | None:
        """Plan the next step. None when the pipeline is full or there is nothing to compute."""
        return self._planner.plan_next()

    def note_published(self, now_s: float) -> list[float]:
        """Note that the planned step has gone out; return how long those sequences had waited whose first one it is."""
        begun = self._planner.take_begun()
        if not begun:
            return []
        queue_s = {seq.sequence_id: now_s - seq.submitted_s for seq in begun}
        self._outputs.add_waits(queue_s)
        return list(queue_s.values())

    def apply(self, result: StepResult) -> None:
        """Append the tokens of the oldest step in flight. ValueError when the result belongs to another step."""
        if result.epoch != self._planner.epoch:
            return
        record = self._planner.take_record(result)
        for index, error in result.failures or ():
            if not record.sampled[index].finished:
                self._fail(record.sampled[index], error)
        self._append_tokens(record.sampled, result)
        self._planner.release_rows(record.step)

    def forget_workers(self, cause: str) -> int:
        """Note that the workers are gone; return how many of the sequences that ran will be prefilled again.

        The sequence that crashed them is failed; see crash_suspects.py.
        """
        culprits = note_crash(self._live.values())
        num_again = sum(seq.row >= 0 for seq in self._live.values()) - len(culprits)
        self.counters.replays += num_again
        for seq in self._live.values():
            seq.forget_workers()
        self._expect_new_workers(self._planner.epoch)
        self._waiting.bring_back(self._live.values())
        for seq in culprits:
            self._fail(seq, f"the workers failed {seq.crashes} times in a row while they ran this request: {cause}")
        return num_again

    def use_workers(self, epoch: int, pool: PoolSize) -> None:
        """Go on with new workers of another epoch; call after `forget_workers`.

        Their pool may be smaller than the first one was, or of that size again.
        """
        room = pool.num_blocks * self.limits.block_size
        if pool != (self.limits.num_blocks, self.limits.num_pages):
            longest = min(self._first_max_seq_len, room)
            self.limits = replace(self.limits, **pool._asdict(), max_seq_len=longest)
        self._expect_new_workers(epoch)
        for seq in [seq for seq in self._live.values() if seq.max_len > room + 1]:
            self._fail(seq, f"after a restart the KV cache holds only {room} tokens, this needs {seq.max_len - 1}")

    def _expect_new_workers(self, epoch: int) -> None:
        self._planner = StepPlanner(
            self.limits, self._waiting, self.counters, self.shares, epoch, self._planner.next_step
        )

    # -- endings and tokens --------------------------------------------------------------------------------------------

    def _fail(self, seq: Sequence, error: str) -> None:
        self._finish(seq)
        self._outputs.add_end(seq.sequence_id, "error", error, seq.cached_tokens)

    def _finish(self, seq: Sequence) -> None:
        seq.finished = True
        del self._live[seq.sequence_id]
        self.counters.finished += 1
        self._waiting.end(seq)
        if seq.row >= 0:
            self._planner.leave(seq)

    def _append_tokens(self, sampled: list[Sequence], result: StepResult) -> None:
        """Append one token per sequence and end those that are done. A token for a finished one is discarded."""
        logprobs = _kept_logprobs(sampled, result)
        seqs: list[Sequence] = []
        tokens: list[int] = []
        finish: list[str] = []
        for seq, token in zip(sampled, result.token_ids, strict=True):
            if seq.finished:
                continue
            seqs.append(seq)
            tokens.append(token)
            seq.tokens.append(token)
            if token in seq.stop_ids or len(seq.tokens) >= seq.max_len:
                self._finish(seq)
                finish.append("stop" if token in seq.stop_ids else "length")
            else:
                finish.append("")
        self.counters.generated_tokens += len(seqs)
        self.counters.discarded_tokens += len(sampled) - len(seqs)
        self._outputs.add_tokens(seqs, tokens, finish, logprobs)


def _kept_logprobs(sampled: list[Sequence], result: StepResult) -> list[list[TokenLogprobs]] | None:
    """Return a list per sequence that is not finished; None if no sequence of the step asked for logprobs."""
    if result.logprobs is None:
        return None
    pairs = zip(sampled, result.logprobs, strict=True)
    return [[] if logprobs is None else [logprobs] for seq, logprobs in pairs if not seq.finished]
