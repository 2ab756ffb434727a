"""Decide what every step computes: continuous batching over a paged KV cache, for a pipeline of any depth.

Pure bookkeeping on integers: no clock, no socket, no torch. A step decodes the requests of one batch (see
decode_batch.py) and fills the rest of its token budget with prefill. The budget is larger than the number of rows, so
neither starves the other.

Steps overlap: step n + 1 is planned and published before the tokens of step n are known. The scheduler needs only their
number for that, since the workers write a sampled token into its row themselves. Example: a request of 10 tokens that
may have 12 decodes in step 1, whose token is its 11th, and in step 2 for its 12th, before the 11th is here. It is in no
step after that. When the 11th then turns out to be a stop token, the request ends with it, and the 12th is discarded.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, replace

from mgpu.orchestrator.scheduler.block_tables import BlockTables
from mgpu.orchestrator.scheduler.crash_suspects import SoloRun, is_suspect, note_crash
from mgpu.orchestrator.scheduler.decode_batch import DecodeBatch
from mgpu.orchestrator.scheduler.limits import Limits, RequestRefused, checked_sequence
from mgpu.orchestrator.scheduler.outputs import StepCounters, StepOutputs
from mgpu.orchestrator.scheduler.rows import RowPool
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.orchestrator.scheduler.waiting import WaitingLine
from mgpu.protocol.internal.gateway_messages import Outputs, Submit
from mgpu.protocol.internal.worker_messages import StepPlan, StepResult, TokenLogprobs


@dataclass(slots=True)
class StepRecord:
    """A published step whose tokens have not arrived; ``sampled`` get them, in this order."""

    step: int
    sampled: list[Sequence]


class Scheduler:
    """All live requests and the steps in flight. One call per event; every request ends in exactly one output."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._most_seq_len = limits.max_seq_len
        self.counters = StepCounters()
        self._epoch = 0
        self._live: dict[int, Sequence] = {}
        self._waiting = WaitingLine()
        self._next_step = 0
        self._arrivals = 0
        self._outputs = StepOutputs()
        self._expect_new_workers()

    def _expect_new_workers(self) -> None:
        """Reset everything that mirrors the state of the workers: new ones hold nothing."""
        limits = self.limits
        self.blocks = BlockTables(limits.num_blocks, limits.block_size, limits.prefix_cache)
        self._admitted: dict[int, Sequence] = {}
        self._prefilling: list[Sequence] = []
        self._batches = [DecodeBatch(index, limits.block_size) for index in range(limits.num_stages)]
        self._in_flight: deque[StepRecord] = deque()
        self._rows = RowPool(limits.max_rows)
        self._solo_run = SoloRun()
        self._blocked: tuple[int, Sequence] | None = None
        """(changes, sequence): the first in line has to wait until the blocks change."""

    # -- what the engine asks ------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_running(self) -> int:
        return len(self._admitted)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def find(self, sequence_id: int) -> Sequence | None:
        """Return a live request; None for any other id."""
        return self._live.get(sequence_id)

    def live_ids(self) -> list[int]:
        return list(self._live)

    def take_outputs(self) -> Outputs | None:
        """Return what happened since the last call; None when nothing did."""
        return self._outputs.take()

    # -- events --------------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """Queue a request; one that can never run is answered with an error now."""
        if submit.sequence_id in self._live:
            return  # every id has one ending, and the gateway never reuses an id
        try:
            seq = checked_sequence(submit, self._arrivals, self.limits)
        except RequestRefused as refusal:
            self._outputs.add_end(submit.sequence_id, "error", str(refusal))
            return
        self._arrivals += 1
        self._live[seq.sequence_id] = seq
        self._waiting.join(seq)

    def refuse(self, sequence_id: int, error: str) -> None:
        """Answer a request that will not be queued, with its one ending."""
        if sequence_id not in self._live:
            self._outputs.add_end(sequence_id, "error", error)

    def cancel(self, sequence_id: int, reason: str) -> None:
        """End a request now, wherever it stands; unknown ids are ignored."""
        seq = self._live.get(sequence_id)
        if seq is not None:
            self._finish(seq)
            self._outputs.add_end(sequence_id, reason, cached_tokens=seq.cached_tokens)

    def fail_all(self, error: str) -> None:
        """End every live request with an error."""
        for seq in list(self._live.values()):
            self._fail(seq, error)

    def _fail(self, seq: Sequence, error: str) -> None:
        self._finish(seq)
        self._outputs.add_end(seq.sequence_id, "error", error, seq.cached_tokens)

    def forget_workers(self, cause: str) -> None:
        """Note that the workers are gone: every live request waits, to be replayed from its tokens.

        The request that crashed them is failed; see crash_suspects.py.
        """
        culprits = note_crash(self._live.values())
        for seq in self._live.values():
            self.counters.replays += seq.row >= 0
            seq.forget_workers()
        self._expect_new_workers()
        self._waiting.bring_back(self._live.values())
        for seq in culprits:
            self.counters.replays -= 1
            self._fail(seq, f"the workers failed {seq.crashes} times in a row while they ran this request: {cause}")

    def resume(self, epoch: int, num_blocks: int) -> None:
        """Go on with new workers of another epoch; call after `forget_workers`.

        Their pool may be smaller than the first one was, or of that size again.
        """
        self._epoch = epoch
        if num_blocks == self.limits.num_blocks:
            return
        room = num_blocks * self.limits.block_size
        self.limits = replace(self.limits, num_blocks=num_blocks, max_seq_len=min(self._most_seq_len, room))
        self._expect_new_workers()
        for seq in [seq for seq in self._live.values() if seq.max_len > room + 1]:
            self._fail(seq, f"after a restart the KV cache holds only {room} tokens, this needs {seq.max_len - 1}")

    def schedule(self) -> StepPlan | None:
        """Plan the next step. None when the pipeline is full or there is nothing to compute.

        Step numbers skip the turns of batches that have nothing to do.
        """
        self._end_solo_run()
        for step in range(self._next_step, self._next_step + len(self._batches)):
            if self._in_flight and step - self._in_flight[0].step > len(self._batches):
                return None
            plan = self._plan_step(step)
            if plan.rows:
                self._next_step = step + 1
                self._rows.to_free = []
                self.counters.steps += 1
                return plan
        return None

    def apply(self, result: StepResult) -> None:
        """Append the tokens of the oldest step in flight. ValueError when the result belongs to another step."""
        if result.epoch != self._epoch:
            return
        record = self._in_flight[0] if self._in_flight else None
        if record is None or record.step != result.step or len(record.sampled) != len(result.token_ids):
            raise ValueError(f"result of step {result.step} does not fit the step in flight: {record}")
        self._in_flight.popleft()
        self._append_tokens(record.sampled, result)
        self._release_rows_until(record.step)

    def _end_solo_run(self) -> None:
        """Let the next suspect run alone when the one that runs is cleared; see crash_suspects.py."""
        cleared, first = self._solo_run.clear(), self._waiting.first()
        if cleared is not None and first is not None and is_suspect(first):
            self._preempt(cleared)

    # -- planning ------------------------------------------------------------------------------------------------------

    def _plan_step(self, step: int) -> StepPlan:
        index = step % len(self._batches)
        batch = self._batches[index]
        plan = StepPlan(self._epoch, step, self._rows.to_free, [], [], [], [], [], [], [])
        self._even_out(index)
        sampled = self._plan_decode(batch, plan)
        prefilled = self._plan_prefill(batch, plan, sampled)
        if plan.rows:
            self._in_flight.append(StepRecord(step, sampled))
        for seq in prefilled:  # only now: a block can be reused from the next step on
            self.blocks.offer(seq, seq.num_computed)
        return plan

    def _even_out(self, index: int) -> None:
        """Move members above this batch's share to the next batch, whose turn comes one step later."""
        if len(self._batches) == 1:
            return
        batch, following = self._batches[index], self._batches[(index + 1) % len(self._batches)]
        share = -(-sum(len(each.members) for each in self._batches) // len(self._batches))
        while len(batch.members) > share:
            seq = batch.members[-1]
            batch.remove(seq)
            following.add(seq, seq.num_computed)

    def _plan_decode(self, batch: DecodeBatch, plan: StepPlan) -> list[Sequence]:
        due = batch.due()
        for seq in due:
            if batch.holds(seq) and batch.needs_block(seq):
                self.blocks.offer(seq, batch.starts[seq.slot])
                self._grow(seq, plan)
        count = len(batch.members)
        if not count:
            return []
        plan.rows.extend(batch.rows)
        plan.starts.extend(batch.starts)
        plan.counts.extend([1] * count)
        plan.samples.extend([1] * count)
        sampled = batch.members.copy()
        batch.advance()
        for seq in due:
            if batch.holds(seq):
                if batch.is_planned_to_the_end(seq):
                    batch.remove(seq)
                else:
                    batch.remind(seq)
        return sampled

    def _grow(self, seq: Sequence, plan: StepPlan) -> None:
        """Append a block to a decoding request; if none is free, preempt the requests that began last."""
        while (block := self.blocks.grow(seq)) is None:
            victim = max(self._admitted.values(), key=lambda each: each.turn)
            self._preempt(victim)
            if victim is seq:
                return
        plan.block_rows.append(seq.row)
        plan.block_ids.append(block)

    def _plan_prefill(self, batch: DecodeBatch, plan: StepPlan, sampled: list[Sequence]) -> list[Sequence]:
        """Spend the rest of the token budget on prompts, admitted ones first, and return the requests that got a share."""
        budget = self.limits.max_batch_tokens - len(plan.rows)
        touched: list[Sequence] = []
        for seq in self._prefilling:
            if not budget:
                break
            budget -= self._plan_chunk(seq, budget, plan)
            touched.append(seq)
        while budget and (admitted := self._admit_next()) is not None:
            plan.new_rows.append(admitted.to_new_row())
            insort(self._prefilling, admitted, key=lambda each: each.turn)
            budget -= self._plan_chunk(admitted, budget, plan)
            touched.append(admitted)
        for seq in touched:
            if seq.num_computed == len(seq.tokens):
                sampled.append(seq)
                self._prefilling.remove(seq)
                if len(seq.tokens) + 1 < seq.max_len:
                    batch.add(seq, seq.num_computed)
        return touched

    def _plan_chunk(self, seq: Sequence, budget: int, plan: StepPlan) -> int:
        start = seq.num_computed
        count = min(budget, len(seq.tokens) - start)
        seq.num_computed = start + count
        plan.rows.append(seq.row)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.samples.append(int(seq.num_computed == len(seq.tokens)))
        return count

    def _admit_next(self) -> Sequence | None:
        """Give a row and blocks to the first in line and return it. None when it must wait: no request overtakes it."""
        seq = self._waiting.first()
        if seq is None or not self._rows.has_free or self._blocked == (self.blocks.changes, seq):
            return None
        if self._solo_run.holds_back(seq, is_idle=not self._admitted and not self._in_flight):
            return None
        # One block per running request stays free, so that the newcomer is not preempted right away.
        if not self.blocks.take(seq, reserve=len(self._admitted)):
            self._blocked = (self.blocks.changes, seq)
            return None
        if seq.turn < 0:
            seq.cached_tokens = seq.num_computed
            self.counters.prompt_tokens += seq.prompt_len
            self.counters.prefix_hit_tokens += seq.num_computed
        self._waiting.take_first()
        self._rows.take(seq)
        self._admitted[seq.sequence_id] = seq
        self._solo_run.begin(seq)
        return seq

    # -- leaving -------------------------------------------------------------------------------------------------------

    def _preempt(self, seq: Sequence) -> None:
        """Take row and blocks away; the request runs again from its tokens when those in flight have arrived."""
        self._leave_workers(seq)
        self.counters.preemptions += 1

    def _finish(self, seq: Sequence) -> None:
        seq.finished = True
        del self._live[seq.sequence_id]
        self.counters.finished += 1
        self._waiting.end(seq)
        if seq.row >= 0:
            self._leave_workers(seq)

    def _leave_workers(self, seq: Sequence) -> None:
        if seq.batch >= 0:
            self._batches[seq.batch].remove(seq)
        elif seq in self._prefilling:
            self._prefilling.remove(seq)
        self.blocks.release(seq)
        self._solo_run.end(seq)
        del self._admitted[seq.sequence_id]
        self._rows.give_back(seq, last_step=self._next_step - 1)
        if not self._in_flight:
            self._release_rows_until(self._next_step)

    def _release_rows_until(self, step: int) -> None:
        for seq in self._rows.release_until(step):
            if not seq.finished:  # it was preempted
                self._waiting.join(seq)

    # -- results -------------------------------------------------------------------------------------------------------

    def _append_tokens(self, sampled: list[Sequence], result: StepResult) -> None:
        """Append one token per sequence and end those that are done."""
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

    # -- proofs --------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Prove that blocks and rows add up. AssertionError if not; cheap enough for an idle moment."""
        self.blocks.pool.check_integrity(seq.blocks for seq in self._admitted.values())
        self._rows.check_integrity(seq.row for seq in self._admitted.values())
        if not self._live:
            assert self.blocks.pool.num_free == self.limits.num_blocks, "blocks are held without a request"


def _kept_logprobs(sampled: list[Sequence], result: StepResult) -> list[list[TokenLogprobs]] | None:
    """Return the logprobs of the sequences that go on, one list each; None if no sequence of the step asked."""
    if result.logprobs is None:
        return None
    pairs = zip(sampled, result.logprobs, strict=True)
    return [[] if logprobs is None else [logprobs] for seq, logprobs in pairs if not seq.finished]
