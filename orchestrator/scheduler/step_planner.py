"""Plan the steps of one worker group: who gets a row and blocks, who decodes, who is prefilled, who must leave.

A `StepPlanner` mirrors what the workers hold, so new workers get a new one. A step decodes the sequences of one batch
(see decode_batch.py) and fills the rest of its token budget with prefill. The budget is larger than the number of rows,
so neither starves the other.

Steps overlap: step n + 1 is planned and published before the tokens of step n are known. Only their number is needed
for that, since the workers write a sampled token into its row themselves. Example: a sequence of 10 tokens that may
have 12 is prefilled in step 1, which samples its 11th, and decodes in step 2 to its 12th, before the 11th is here. It
is in no step after that. If the 11th then is a stop token, the sequence ends with it, and the 12th is discarded.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass

from mgpu.orchestrator.scheduler.block_tables import BlockTables
from mgpu.orchestrator.scheduler.crash_suspects import SoloRun, is_suspect
from mgpu.orchestrator.scheduler.decode_batch import DecodeBatch
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.scheduler.outputs import StepCounters
from mgpu.orchestrator.scheduler.resting import Resting
from mgpu.orchestrator.scheduler.rows import RowPool
from mgpu.orchestrator.scheduler.running_shares import RunningShares
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.orchestrator.scheduler.snapshots import Snapshots
from mgpu.orchestrator.scheduler.waiting import WaitingLine
from mgpu.orchestrator.scheduler.window_pages import WindowPages
from mgpu.protocol.internal.worker_messages import StepPlan, StepResult

SPARE = 1 / 16
"""Of rows and blocks: what the owner that runs the most leaves free while there are others."""


@dataclass(slots=True)
class StepRecord:
    """A published step whose tokens have not arrived; ``sampled`` get them, in this order."""

    step: int
    sampled: list[Sequence]


class StepPlanner:
    """The sequences that run on one worker group, and its steps in flight."""

    def __init__(
        self,
        limits: Limits,
        waiting: WaitingLine,
        counters: StepCounters,
        shares: RunningShares,
        epoch: int,
        next_step: int,
    ) -> None:
        self.epoch = epoch
        self.next_step = next_step
        snapshots = Snapshots(limits.max_rows, limits.num_snapshots) if limits.num_snapshots else None
        pages = None
        if limits.num_pages:
            pages = WindowPages(limits.num_blocks, limits.num_pages, limits.block_size, limits.sight)
        self.blocks = BlockTables(limits.num_blocks, limits.block_size, limits.prefix_cache, snapshots, pages)
        self.admitted: dict[int, Sequence] = {}
        self.in_flight: deque[StepRecord] = deque()
        self._limits = limits
        self._waiting = waiting
        self._counters = counters
        self._shares = shares
        shares.clear()
        self._rows = RowPool(limits.max_rows)
        self._prefilling: list[Sequence] = []
        """By turn."""
        self._batches = [DecodeBatch(index, limits.block_size) for index in range(limits.num_stages)]
        self._resting = [Resting(batch, shares) for batch in self._batches]
        self._solo_run = SoloRun()
        self._begun: list[Sequence] = []
        """Those that have begun to run since `take_begun`."""
        self._blocked: tuple[int, Sequence, float] | None = None
        """(changes, sequence, spare): the first in line has to wait until the blocks change, or what stays free."""

    def plan_next(self) -> StepPlan | None:
        """Plan the next step. None when the pipeline is full or there is nothing to compute.

        Step numbers skip the turns of batches that have nothing to do.
        """
        self._end_solo_run()
        for step in range(self.next_step, self.next_step + len(self._batches)):
            if self.in_flight and step - self.in_flight[0].step > len(self._batches):
                return None
            plan = self._plan_step(step)
            if plan.rows:
                self.next_step = step + 1
                self._rows.to_free = []
                self._counters.steps += 1
                return plan
        return None

    def take_begun(self) -> list[Sequence]:
        """Return the sequences that have begun to run, for the first time, since the last call."""
        taken, self._begun = self._begun, []
        return taken

    def take_record(self, result: StepResult) -> StepRecord:
        """Return the oldest step in flight and forget it. ValueError when the result belongs to another step."""
        record = self.in_flight[0] if self.in_flight else None
        if record is None or record.step != result.step or len(record.sampled) != len(result.token_ids):
            raise ValueError(f"result of step {result.step} does not fit the step in flight: {record}")
        return self.in_flight.popleft()

    def leave(self, seq: Sequence) -> None:
        """Take row and blocks away from a sequence."""
        if seq.batch >= 0:
            self._batches[seq.batch].remove(seq)
        elif seq in self._prefilling:
            self._prefilling.remove(seq)
        else:
            any(resting.end(seq) for resting in self._resting)
        self.blocks.release(seq)
        self._solo_run.end(seq)
        del self.admitted[seq.sequence_id]
        self._shares.end(seq)
        self._rows.give_back(seq, last_step=self.next_step - 1)
        if not self.in_flight:
            self.release_rows(self.next_step)

    def release_rows(self, step: int) -> None:
        """Free the rows of sequences that left, up to those whose last token came with the result of ``step``."""
        for seq in self._rows.release_until(step):
            if not seq.finished:  # it was preempted
                self._waiting.join(seq)

    def check_integrity(self) -> None:
        """Prove that blocks and rows add up. AssertionError if not."""
        self.blocks.pool.check_integrity(seq.blocks for seq in self.admitted.values())
        if self.blocks.snapshots is not None:
            self.blocks.snapshots.check_integrity()
        if self.blocks.pages is not None:
            views = [[seq.blocks[index] for index in seq.sight] for seq in self.admitted.values()]
            self.blocks.pages.check_integrity(views)
        self._rows.check_integrity(seq.row for seq in self.admitted.values())

    # -- one step ------------------------------------------------------------------------------------------------------

    def _plan_step(self, step: int) -> StepPlan:
        index = step % len(self._batches)
        batch = self._batches[index]
        plan = StepPlan(self.epoch, step, self._rows.to_free, [], [], [], [], [], [], [])
        self._even_out(index)
        self._shares.begin_step()
        self._make_room()
        self._resting[index].begin_step()
        sampled = self._plan_decode(batch, plan)
        prefilled = self._plan_prefill(batch, plan, sampled)
        while not plan.rows and self._preempts_for_pages():
            prefilled = self._plan_prefill(batch, plan, sampled)
        if plan.rows:
            if self.blocks.pages is not None:
                self.blocks.pages.move_granted(plan.page_blocks, plan.page_ids)
            self.in_flight.append(StepRecord(step, sampled))
        for seq in prefilled:  # only now: a block can be reused from the next step on
            self.blocks.register(seq, seq.num_computed)
            self.blocks.leave_behind(seq, seq.num_computed)
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
        """Plan one token for every member and return the members."""
        due = batch.due()
        grown: set[Sequence] = set()
        for seq in due:
            if batch.holds(seq) and batch.needs_block(seq):
                self.blocks.register(seq, batch.starts[seq.slot])
                self._save(seq, self.blocks.save_answer(seq), plan)
                self._grow(seq, plan, grown)
                grown.add(seq)
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

    def _save(self, seq: Sequence, slot: int | None, plan: StepPlan) -> None:
        """Have the state of a sequence copied to a slot, as it is before this step; None: not at all."""
        if slot is not None:
            plan.save_rows.append(seq.row)
            plan.save_slots.append(slot)

    def _grow(self, seq: Sequence, plan: StepPlan, grown: set[Sequence]) -> None:
        """Append a block to a decoding sequence; while none is free, preempt one of those that began last.

        Not one that has ``grown`` in this step: the plan has its block.
        """
        while (block := self.blocks.grow(seq)) is None:
            victim = self._shares.victim_for(seq, [each for each in self.admitted.values() if each not in grown])
            self._preempt(victim)
            if victim is seq:
                return
        plan.block_rows.append(seq.row)
        plan.block_ids.append(block)

    def _preempt(self, seq: Sequence) -> None:
        """Let a sequence leave; it runs again from its tokens when those in flight have arrived."""
        self.leave(seq)
        self._counters.preemptions += 1

    def _preempts_for_pages(self) -> bool:
        """Preempt a sequence if prompts alone run and none of them finds a page; return whether that was so.

        Beside sequences that decode, prompts wait for the pages of those.
        """
        has_pages = self.blocks.pages is None or self.blocks.pages.num_free > 0
        is_stuck = not has_pages and 1 < len(self._prefilling) == len(self.admitted)
        if is_stuck:
            self._preempt(self._prefilling[-1])
        return is_stuck

    def _plan_prefill(self, batch: DecodeBatch, plan: StepPlan, sampled: list[Sequence]) -> list[Sequence]:
        """Spend the rest of the token budget on prompts, admitted ones first; return those that got a share.

        No owner gets more of it than leaves the others their speed (running_shares.py).

        A sequence whose prompt is complete is added to ``sampled`` and, if it may have another token, to the batch.
        """
        budget = self._limits.max_batch_tokens - len(plan.rows)
        touched: list[Sequence] = []
        for seq in self._prefilling:
            if (room := min(budget, self._shares.prompt_tokens(seq))) and (count := self._plan_chunk(seq, room, plan)):
                budget -= count
                touched.append(seq)
        while budget and (admitted := self._admit_next()) is not None:
            plan.new_rows.append(admitted.to_new_row())
            insort(self._prefilling, admitted, key=lambda each: each.turn)
            budget -= self._plan_chunk(admitted, min(budget, self._shares.prompt_tokens(admitted)), plan)
            touched.append(admitted)
        for seq in touched:
            if seq.num_computed == len(seq.tokens):
                sampled.append(seq)
                self._prefilling.remove(seq)
                if len(seq.tokens) + 1 < seq.max_len:
                    batch.add(seq, seq.num_computed)
                    self._shares.begin_decoding(seq)
        return touched

    def _plan_chunk(self, seq: Sequence, budget: int, plan: StepPlan) -> int:
        """Plan the next tokens of a prompt and return how many; 0 if all pages are in use."""
        self._save(seq, self.blocks.save_prompt(seq), plan)
        start = seq.num_computed
        count = min(budget, len(seq.tokens) - start, self.blocks.tokens_to_save(seq))
        count = self.blocks.come_into_sight(seq, start, count)
        if not count:
            return 0
        seq.num_computed = start + count
        plan.rows.append(seq.row)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.samples.append(int(seq.num_computed == len(seq.tokens)))
        self._shares.spend(seq, count)
        return count

    # -- admission -----------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Preempt sequences for the first in line, if it is new and its owner runs much less than another.

        Before anything of the step is planned: what leaves is in no step from this one on.
        """
        self._waiting.hold(self._shares.full())
        while (seq := self._waiting.first()) is not None and seq.turn < 0 and self._shares.lacks(seq.account[0]):
            if self._solo_run.holds_back(seq, is_idle=False):
                return
            if self._rows.num_to_come and self.blocks.has_room(len(seq.tokens), len(self.admitted)):
                return
            self._preempt(self._shares.victim_for(seq, self.admitted.values()))

    def _admit_next(self) -> Sequence | None:
        """Assign a row and blocks to the first in line and return it. None when it must wait: no other overtakes it."""
        self._waiting.hold(self._shares.full())
        seq = self._waiting.first()
        if seq is None:
            return None
        spare = SPARE if self._shares.leaves_room(seq.account[0]) else 0.0
        is_blocked = self._blocked == (self.blocks.changes, seq, spare)
        if is_blocked or self._rows.num_free <= int(spare * self._limits.max_rows):
            return None
        if self._shares.prompt_tokens(seq) < 1:
            return None
        if self._solo_run.holds_back(seq, is_idle=not self.admitted and not self.in_flight):
            return None
        # One block per running sequence stays free, so that the newcomer is not preempted right away.
        if not self.blocks.take(seq, len(self.admitted), spare):
            self._blocked = (self.blocks.changes, seq, spare)
            return None
        if seq.turn < 0:
            seq.cached_tokens = min(seq.num_computed, seq.prompt_len)
            self._counters.prompt_tokens += seq.prompt_len
            self._counters.prefix_hit_tokens += seq.cached_tokens
            self._begun.append(seq)
        self._waiting.take_first()
        self._rows.take(seq)
        self.admitted[seq.sequence_id] = seq
        self._shares.begin(seq)
        self._solo_run.begin(seq)
        return seq

    def _end_solo_run(self) -> None:
        """Let the next suspect run alone when the one that runs is cleared; see crash_suspects.py."""
        cleared, first = self._solo_run.clear(), self._waiting.first()
        if cleared is not None and first is not None and is_suspect(first):
            self._preempt(cleared)
