"""The step loop: what clients want goes in, steps go out to the workers, tokens come back."""

import contextlib
import logging
import math
import time
from collections import deque
from dataclasses import replace

from mgpu.orchestrator.engine.polling import SpinPolicy, poller_of
from mgpu.orchestrator.engine.resume_journal import Journal
from mgpu.orchestrator.engine.stats import EngineStats
from mgpu.orchestrator.engine.step_deadline import StepDeadline
from mgpu.orchestrator.errors import with_traceback
from mgpu.orchestrator.host.reload import Reloader
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.host.signals import StopSignals
from mgpu.orchestrator.host.systemd import Notifier
from mgpu.orchestrator.processes.gateway_process import GatewayLost, GatewayProcess
from mgpu.orchestrator.processes.restarts import RestartLimit, WorkerRecovery, WorkersHung
from mgpu.orchestrator.processes.worker_group import WorkerLost
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.protocol.internal.gateway_messages import (
    Cancel,
    EngineInfo,
    GatewayReady,
    Resumable,
    Resume,
    Resumed,
    StatsQuery,
    StatsReply,
    Submit,
    WakeUp,
)
from mgpu.protocol.internal.worker_messages import CONTROL, StaySpinning, StepResult

log = logging.getLogger(__name__)

MESSAGES_PER_STEP = 256
"""Most gateway messages taken in between two steps, so that a flood of them does not hold up the workers."""
LOOK_INTERVAL_S = 0.01
"""How often signals and processes are looked at while results keep coming without a wait."""
PARK_S = 1.0
"""Longest sleep; every deadline is checked at least this often."""
STANDSTILL_S = PARK_S + 1.0
"""A longer time between two looks is none that the workers can be blamed for."""


class Engine:
    """Connects scheduler, workers and gateway; runs in the main thread, without asyncio."""

    def __init__(
        self,
        scheduler: Scheduler,
        recovery: WorkerRecovery,
        gateway: GatewayProcess,
        signals: StopSignals,
        info: EngineInfo,
        notifier: Notifier,
        reloader: Reloader,
        runtime: RuntimeDir,
        *,
        spin_s: float,
        gateway_restarts: RestartLimit,
        hang_timeout_s: float,
        resume_timeout_s: float,
        drain_timeout_s: float,
    ) -> None:
        self.stats = EngineStats()
        self._scheduler = scheduler
        self._recovery = recovery
        self._workers = recovery.group
        self._gateway = gateway
        self._signals = signals
        self._info = info
        self._told_state = info.state
        self._notifier = notifier
        self._reloader = reloader
        self._runtime = runtime
        self._spin = SpinPolicy(spin_s)
        self._journal = Journal()
        self._gateway_restarts = gateway_restarts
        self._resume_timeout_s = resume_timeout_s
        self._claim_deadline_s: float | None = None
        """Until when clients may come back after the gateway was lost."""
        self._step_deadline = StepDeadline(hang_timeout_s)
        self._drain_timeout_s = drain_timeout_s
        self._drain_deadline_s: float | None = None
        self._published: deque[tuple[float, int]] = deque()
        """When each step in flight went out, and its tokens."""
        self._last_result_s = self._last_look_s = self._woke_s = time.monotonic()
        self._watch()

    def expect_steps(self, num_tokens: int, seconds: float) -> None:
        """Say how long a step takes here, before the first is done: a large model on a slow CPU is not hung."""
        self._step_deadline.note(num_tokens, seconds)

    def run(self) -> None:
        """Serve until a signal came and the running requests are done, or out of time, or a second signal came.

        TooManyRestarts when serving cannot go on.
        """
        while not self._is_over():
            try:
                self._tell_state()  # before queries are answered, so that counters and state agree
                self._drain_inbox()
                self._publish_steps()
                self._emit()  # what was refused or cancelled must not wait for the next result
                self._gather_results()
                self._emit()
            except (WorkerLost, WorkersHung) as cause:
                self._replace_workers(cause)
            except GatewayLost as cause:
                self._replace_gateway(cause)
        with contextlib.suppress(GatewayLost):  # no time for another one
            self._tell_state()

    def end_requests(self, error: str) -> None:
        """Give every request that is still alive its one ending."""
        self._scheduler.fail_all(error)
        self._emit()

    # -- the four parts of a step --------------------------------------------------------------------------------------

    def _drain_inbox(self) -> None:
        for message in self._gateway.receive(MESSAGES_PER_STEP):
            self._on_message(message)

    def _publish_steps(self) -> None:
        """Fill the pipeline: the next step is out before the tokens of the last one are back."""
        while self._recovery.is_ready:
            began = time.perf_counter()
            plan = self._scheduler.schedule()
            if plan is None:
                if not self._scheduler.num_running:
                    self.stats.note_idle()
                return
            planned = time.perf_counter()
            self._workers.publish(CONTROL.encode(plan))
            published_s = time.monotonic()
            if not self._published:
                self.stats.note_fed(published_s)
            self._published.append((published_s, sum(plan.counts)))
            self.stats.schedule_us.add((planned - began) * 1e6)
            self.stats.publish_us.add((time.perf_counter() - planned) * 1e6)

    def _gather_results(self) -> None:
        """Apply the results that are there; if there are none, wait for one or for anything else to do."""
        if not self._recovery.is_ready:
            self._look_around(self._park_s())
            return
        result = self._workers.try_result() or self._await_result()
        if time.monotonic() - self._last_look_s > LOOK_INTERVAL_S:
            self._look_around(0.0)
        while result is not None:
            self._apply(result)
            result = self._workers.try_result()
        self._check_progress()

    def _emit(self) -> None:
        outputs = self._scheduler.take_outputs()
        if outputs is not None:
            self._journal.note(outputs)
            self._gateway.send(outputs)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _on_message(self, message: object) -> None:
        if isinstance(message, Submit):
            self._on_submit(message)
        elif isinstance(message, Resumable):
            self._on_resumable(message)
        elif isinstance(message, WakeUp):
            self._on_wake_up()
        elif isinstance(message, Cancel):
            self._scheduler.cancel(message.sequence_id, message.reason)
        elif isinstance(message, StatsQuery):
            self._tell_state()  # health shows both: a restart that is counted must not look as if it were over
            self._gateway.send(StatsReply(message.query_id, self._counters()))
        elif isinstance(message, Resume):
            self._emit()  # what is said so far is part of the answer; what is said later continues it
            name = (message.session, message.request_id)
            self._gateway.send(Resumed(message.query_id, *self._journal.look_up(*name, message.known, message.offsets)))
        elif isinstance(message, GatewayReady):
            self._on_new_gateway()

    def _on_resumable(self, message: Resumable) -> None:
        if not self._journal.open(message):
            for submit in message.submits:
                self._scheduler.refuse(submit.sequence_id, "a request of this session and id is running; resume it")
            return
        for submit in message.submits:
            self._on_submit(submit)
            self._journal.attach(submit.sequence_id, self._scheduler.find(submit.sequence_id))

    def _on_wake_up(self) -> None:
        """Be awake when the request is read, and have the workers awake when the first step goes out."""
        if self._spin.stay_awake(time.monotonic()) and self._recovery.is_ready:
            self._workers.publish(CONTROL.encode(StaySpinning(self._workers.epoch)))

    # -- details -------------------------------------------------------------------------------------------------------

    def _on_submit(self, submit: Submit) -> None:
        if self._drain_deadline_s is not None:
            self._scheduler.refuse(submit.sequence_id, "the server is finishing its last requests before it stops")
            return
        try:
            self._scheduler.submit(submit)
        except Exception:  # whatever is wrong with one request must not end the others
            log.exception("request %d could not be taken in", submit.sequence_id)
            self._scheduler.refuse(submit.sequence_id, "internal error: the request could not be taken in")

    def _apply(self, result: StepResult) -> None:
        began = time.perf_counter()
        try:
            self._scheduler.apply(result)
        except ValueError as error:
            raise self._workers.broken(str(error)) from error
        self._last_result_s = time.monotonic()
        if self._published:
            published_s, num_tokens = self._published.popleft()
            self.stats.step_us.add((self._last_result_s - published_s) * 1e6)
            self._step_deadline.note(num_tokens, self._last_result_s - published_s)
            if not self._published and self._scheduler.num_running:
                self.stats.note_dry(self._last_result_s)
        self.stats.compute_us.add(result.compute_us)
        self.stats.apply_us.add((time.perf_counter() - began) * 1e6)

    def _await_result(self) -> StepResult | None:
        """Look for a result that is due without a pause; else sleep until it is, or until anything else happens."""
        due_s = self._due_s()
        while not (sleep_s := self._spin.sleep_s(time.monotonic(), due_s)):
            if due_s is None:  # what is about to come will come from the gateway
                return None
            if (result := self._workers.try_result()) is not None:
                return result
        self._look_around(min(sleep_s, self._park_s()))
        return self._workers.try_result()

    def _due_s(self) -> float | None:
        if not self._published:
            return None
        published_s, num_tokens = self._published[0]
        return published_s + self._step_deadline.usual_s(num_tokens)

    def _park_s(self) -> float:
        if self._drain_deadline_s is None:
            return PARK_S
        return min(PARK_S, max(0.0, self._drain_deadline_s - time.monotonic()))

    def _look_around(self, timeout_s: float) -> None:
        """Sleep until something happens, and take in all that is no result and no gateway message."""
        self._run_periodic_work()  # first: who wakes this process up is in more of a hurry
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if (now_s := time.monotonic()) - self._last_look_s > STANDSTILL_S:
            self._woke_s = now_s  # this process was stopped, and results may not have reached it yet
        self._last_look_s = now_s
        if self._signals.fd in ready:
            self._signals.clear()
        if self._signals.take_reload():
            self._reload()
        if self._gateway.process.pidfd in ready:
            self._gateway.check_alive()
        if any(process.pidfd in ready for process in self._workers.processes):
            self._workers.check_deaths()
        if any(socket in ready for socket in self._workers.sockets):
            self._workers.read_all()
        if not self._recovery.is_ready:
            self._await_workers()

    def _run_periodic_work(self) -> None:
        """Watchdog, journal, runtime folder, standby workers and systemd: each acts when its own time has come."""
        self._gateway.check_watchdog()
        self._drop_unclaimed()
        self._journal.prune()
        self._runtime.restore_if_removed()
        running, live = self._scheduler.num_running, self._scheduler.num_live
        if self._recovery.is_ready:
            self._recovery.prepare_standby()
            self._notifier.serving(running, live - running, self._waited_s())
        else:
            self._notifier.recovering(live)

    def _reload(self) -> None:
        self._notifier.reloading("reading the configuration again")
        values = self._reloader.read()
        if values is not None:
            self._drain_timeout_s = values.drain_timeout_s
            self._gateway.reload(values.keys, values.client_limits)
        self._notifier.reloaded()

    def _waited_s(self) -> float:
        """Give how long the workers have been at the oldest step, 0 if they have none."""
        if not self._published:
            return 0.0
        return time.monotonic() - max(self._last_result_s, self._published[0][0], self._woke_s)

    def _check_progress(self) -> None:
        if not self._published:
            return
        waited_s, num_tokens = self._waited_s(), self._published[0][1]
        if waited_s > (limit_s := self._step_deadline.seconds_for(num_tokens)):
            raise WorkersHung(
                f"the workers hang: no result of a step of {num_tokens} tokens for {waited_s:.1f} s, longer than "
                f"{limit_s:.1f} s (at least --hang-timeout)"
            )

    # -- failures and endings ------------------------------------------------------------------------------------------

    def _replace_workers(self, cause: Exception) -> None:
        """Throw the worker group away and start another one; what ran waits until it is there."""
        was_ready, running = self._recovery.is_ready, self._scheduler.num_running
        if was_ready:
            self._scheduler.forget_workers(str(cause))
            self._published.clear()
        self._recovery.begin(cause)
        if was_ready:
            log.warning("%d running requests wait for new workers", running)
        self._workers = self._recovery.group
        self._watch()

    def _await_workers(self) -> None:
        """Lead the new workers on; when they are ready, everything is replayed."""
        self._recovery.advance()
        if not self._recovery.is_ready:
            return
        self._scheduler.resume(self._workers.epoch, self._recovery.num_blocks)
        limits = self._scheduler.limits
        self._info = replace(self._info, max_seq_len=limits.max_seq_len, kv_tokens=limits.kv_tokens)
        log.info("recovered in %.2f s; %d requests go on", self._recovery.last_s, self._scheduler.num_live)

    def _replace_gateway(self, cause: GatewayLost) -> None:
        """Start another gateway on the same endpoint; requests whose clients can resume them go on meanwhile."""
        log.error("%s", with_traceback(cause))
        self._gateway_restarts.note(cause, is_free=cause.caused_by_clients)
        for message in self._gateway.restart(replace(self._info, state=self._state)):
            if not isinstance(message, WakeUp):  # what was coming went down with it
                self._on_message(message)
        for sequence_id in self._scheduler.live_ids():
            if not self._journal.knows(sequence_id):
                self._scheduler.cancel(sequence_id, "cancelled")
        self._journal.lose_clients()
        self._claim_deadline_s = None
        self._watch()
        log.warning("restart %d of the gateway", self._gateway_restarts.count)

    def _on_new_gateway(self) -> None:
        self._told_state = ""
        self._claim_deadline_s = time.monotonic() + self._resume_timeout_s
        log.info("the gateway is back; clients may resume %d requests", self._scheduler.num_live)

    def _drop_unclaimed(self) -> None:
        """End what no client has come back for."""
        if self._claim_deadline_s is not None and time.monotonic() > self._claim_deadline_s:
            self._claim_deadline_s = None
            for sequence_id in self._journal.unclaimed():
                self._scheduler.cancel(sequence_id, "cancelled")

    def _tell_state(self) -> None:
        """Tell the gateway when the state is another than it knows. GatewayLost, which `run` deals with."""
        state = self._state
        if state != self._told_state and self._gateway.is_ready:
            self._gateway.send(replace(self._info, state=state))
            self._told_state = state

    @property
    def _state(self) -> str:
        if self._drain_deadline_s is not None:
            return "draining"
        return "ready" if self._recovery.is_ready else "recovering"

    def _watch(self) -> None:
        """Poll what there is now."""
        self._poller = poller_of(self._signals, self._gateway, self._workers)

    def _counters(self) -> dict[str, float]:
        counters = self.stats.counters(self._scheduler, time.monotonic() - self._last_result_s)
        deadline_s = self._step_deadline.seconds_for(self._published[0][1]) if self._published else math.inf
        return counters | {
            "restarts": float(self._recovery.limit.count),
            "last_recovery_s": self._recovery.last_s,
            "gateway_restarts": float(self._gateway_restarts.count),
            "stalled": float(self._waited_s() > deadline_s / 2),
        }

    def _is_over(self) -> bool:
        signals = self._signals.received
        if not signals:
            return False
        if self._drain_deadline_s is None:
            self._begin_drain()
        assert self._drain_deadline_s is not None
        return len(signals) > 1 or not self._scheduler.num_live or time.monotonic() >= self._drain_deadline_s

    def _begin_drain(self) -> None:
        if num_live := self._scheduler.num_live:
            log.info("stopping: %d requests get up to %g s to finish", num_live, self._drain_timeout_s)
        self._drain_deadline_s = time.monotonic() + self._drain_timeout_s
        self._notifier.stopping("finishing the last requests")
