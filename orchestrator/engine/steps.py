"""The steps in flight: publish them ahead of their results, apply the results, notice workers that hang.

The next step is published before the tokens of the last one are back, so that workers never wait for the orchestrator.
With one stage two steps are in flight: step 7 computes while step 6's tokens travel, are applied and go to clients.
"""

import math
import time
from collections import deque
from collections.abc import Collection
from dataclasses import replace

from mgpu.orchestrator.engine.polling import SpinPolicy
from mgpu.orchestrator.engine.stats import EngineStats
from mgpu.orchestrator.engine.step_costs import StepCosts
from mgpu.orchestrator.engine.step_times import StepTimes
from mgpu.orchestrator.processes.failures import WorkersHung
from mgpu.orchestrator.processes.worker_processes import WorkerProcesses
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.protocol.internal.worker_messages import CONTROL, Ready, StaySpinning, StepPlan, StepResult, Vocabulary

TRIAL_STEP_SHARE = 0.5
"""The warm-up runs two prompts and four decode steps; one prompt takes about half of its time."""


class StepPipeline:
    """Carries steps from the scheduler to the workers and results back."""

    def __init__(self, scheduler: Scheduler, workers: WorkerProcesses, spin_s: float, hang_timeout_s: float) -> None:
        self._stats = EngineStats()
        self._scheduler = scheduler
        self._workers = workers
        self._spin = SpinPolicy(spin_s)
        self._times, self._costs = StepTimes(hang_timeout_s), StepCosts()
        scheduler.shares.room_beside = self._costs.room_beside
        scheduler.shares.prompt_room_beside = self._costs.prompt_room_beside
        self._published: deque[tuple[float, int, bool]] = deque()
        """When each step in flight went out, its tokens, and whether it computes prompts.

        A token that is costly to choose counts for more."""
        self.vocabulary: Vocabulary | None = None
        """What the gateway knows of the model's tokens; None before the first request with a grammar."""
        self._vocabulary_epoch = -1
        """The worker group that has it."""
        self._arrived: StepResult | None = None
        """A result that `spin` has found and `apply` has not taken in."""
        self._last_result_s = self._woke_s = time.monotonic()

    def begin(self, warm_up: Collection[Ready]) -> None:
        """Count from now on, and learn from the ``warm_up`` what a step takes: a slow one must not count as hung."""
        self._stats = EngineStats()
        self._last_result_s = time.monotonic()
        if warm_up:
            seconds = max(each.phase_s.get("warmup", 0.0) for each in warm_up) * TRIAL_STEP_SHARE
            num_tokens = max(each.step_tokens for each in warm_up)
            self._times.note(num_tokens, seconds)

    def publish(self) -> None:
        """Publish steps until the pipeline is full."""
        while self._workers.is_ready:
            began = time.perf_counter()
            plan = self._scheduler.schedule()
            if plan is None:
                if not self._scheduler.num_running:
                    self._stats.note_idle()
                return
            planned = time.perf_counter()
            if plan.new_rows:
                self._send_vocabulary(plan)
            self._workers.group.publish(CONTROL.encode(plan))
            published_s = time.monotonic()
            for waited_s in self._scheduler.note_published(published_s):
                self._stats.queue_s.add(waited_s)
            if not self._published:
                self._stats.note_fed(published_s)
            num_tokens = sum(plan.counts)
            has_prompt = num_tokens > len(plan.rows)
            self._published.append((published_s, num_tokens + self._scheduler.shares.extra_cost, has_prompt))
            self._stats.schedule_us.add((planned - began) * 1e6)
            self._stats.publish_us.add((time.perf_counter() - planned) * 1e6)

    def _send_vocabulary(self, plan: StepPlan) -> None:
        """Send a worker group the vocabulary, once, before the first row that has a grammar."""
        group = self._workers.group
        if self._vocabulary_epoch != group.epoch and any(new.sampling.grammar for new in plan.new_rows):
            assert self.vocabulary is not None, "the gateway sends it before the first request with a grammar"
            group.publish(CONTROL.encode(replace(self.vocabulary, epoch=group.epoch)))
            self._vocabulary_epoch = group.epoch

    def spin(self) -> float:
        """Look for a result, without a pause while one is due; return how long to sleep, 0 when there is work to do."""
        group = self._workers.group
        if self._arrived is None:
            self._arrived = group.try_result()
        due_s = self._due_s()
        while self._arrived is None:
            if sleep_s := self._spin.sleep_s(time.monotonic(), due_s):
                return sleep_s
            if due_s is None:  # no step is in flight: stop looking for results, a request is about to arrive
                break
            self._arrived = group.try_result()
        return 0.0

    def apply(self) -> None:
        """Apply the results that have come. WorkersHung when one is overdue."""
        if not self._workers.is_ready:
            return
        group = self._workers.group
        result, self._arrived = self._arrived or group.try_result(), None
        while result is not None:
            self._apply(result)
            result = group.try_result()
        self._check_progress()

    def stay_awake(self) -> None:
        """Be awake when a request is read, and have the workers awake when its first step goes out."""
        if self._spin.stay_awake(time.monotonic()) and self._workers.is_ready:
            self._workers.group.publish(CONTROL.encode(StaySpinning(self._workers.group.epoch)))

    def forget(self) -> None:
        """Drop what is in flight: the workers are gone."""
        self._published.clear()
        self._arrived = None

    def excuse_standstill(self, now_s: float) -> None:
        """Note that this process itself was stopped until now: results may not have reached it yet."""
        self._woke_s = now_s

    def waited_s(self) -> float:
        """Return how long the workers have been at the oldest step, 0 if they have none."""
        if not self._published:
            return 0.0
        return time.monotonic() - max(self._last_result_s, self._published[0][0], self._woke_s)

    def counters(self) -> dict[str, float]:
        """Return what the scheduler and this pipeline count, under the names that clients see."""
        deadline_s = self._times.seconds_for(self._published[0][1]) if self._published else math.inf
        counters = self._stats.counters(self._scheduler, time.monotonic() - self._last_result_s)
        return counters | {"stalled": float(self.waited_s() > deadline_s / 2)}

    def _due_s(self) -> float | None:
        if not self._published:
            return None
        published_s, num_tokens, _ = self._published[0]
        return published_s + self._times.usual_s(num_tokens)

    def _apply(self, result: StepResult) -> None:
        began = time.perf_counter()
        try:
            self._scheduler.apply(result)
        except ValueError as error:
            raise self._workers.group.broken(str(error)) from error
        before_s, self._last_result_s = self._last_result_s, time.monotonic()
        if self._published:
            published_s, num_tokens, has_prompt = self._published.popleft()
            self._costs.note(num_tokens, self._last_result_s - max(published_s, before_s), has_prompt)
            self._stats.step_us.add((self._last_result_s - published_s) * 1e6)
            self._times.note(num_tokens, self._last_result_s - published_s)
            if not self._published and self._scheduler.num_running:
                self._stats.note_dry(self._last_result_s)
        totals = self._scheduler.counters
        self._stats.note_tokens(self._last_result_s, totals.generated_tokens, totals.prompt_tokens)
        self._stats.compute_us.add(result.compute_us)
        self._stats.apply_us.add((time.perf_counter() - began) * 1e6)

    def _check_progress(self) -> None:
        if not self._published:
            return
        waited_s, num_tokens = self.waited_s(), self._published[0][1]
        if waited_s > (limit_s := self._times.seconds_for(num_tokens)):
            raise WorkersHung(
                f"the workers hang: no result of a step of {num_tokens} tokens for {waited_s:.1f} s, longer than "
                f"{limit_s:.1f} s (at least --hang-timeout)"
            )
