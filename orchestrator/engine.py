"""The step loop: what clients want goes in, steps go out to the workers, tokens come back."""

import logging
import time
from collections import deque
from dataclasses import replace

import zmq

from mgpu.orchestrator.gateway_link import GatewayLink
from mgpu.orchestrator.hang import StepDeadline
from mgpu.orchestrator.notify import Notifier
from mgpu.orchestrator.recovery import WorkerRecovery, WorkersHung
from mgpu.orchestrator.scheduler import Scheduler
from mgpu.orchestrator.signals import StopSignals
from mgpu.orchestrator.stats import EngineStats
from mgpu.orchestrator.supervisor import WorkerLost
from mgpu.protocol.control import CONTROL, StepResult
from mgpu.protocol.link import Cancel, EngineInfo, StatsQuery, StatsReply, Submit

log = logging.getLogger(__name__)

MESSAGES_PER_STEP = 256
"""Most gateway messages taken in between two steps, so that a flood of them does not hold up the workers."""
LOOK_INTERVAL_S = 0.01
"""How often signals and processes are looked at while results keep coming without a wait."""
PARK_S = 1.0
"""Longest sleep; every deadline is checked at least this often."""


class Engine:
    """Connects scheduler, workers and gateway; runs in the main thread, without asyncio."""

    def __init__(
        self,
        scheduler: Scheduler,
        recovery: WorkerRecovery,
        gateway: GatewayLink,
        signals: StopSignals,
        info: EngineInfo,
        notifier: Notifier,
        *,
        spin_s: float,
        hang_timeout_s: float,
        drain_timeout_s: float,
    ) -> None:
        self.stats = EngineStats()
        self._scheduler = scheduler
        self._recovery = recovery
        self._workers = recovery.group
        self._gateway = gateway
        self._signals = signals
        self._info = info
        self._notifier = notifier
        self._spin_s = spin_s
        self._step_deadline = StepDeadline(hang_timeout_s)
        self._drain_timeout_s = drain_timeout_s
        self._drain_deadline_s: float | None = None
        self._published: deque[tuple[float, int]] = deque()
        """When each step in flight went out, and its tokens."""
        self._last_result_s = self._last_look_s = time.monotonic()
        self._watch()

    def run(self) -> None:
        """Serve until a signal came and the running requests are done, or out of time, or a second signal came.

        GatewayLost or TooManyRestarts when serving cannot go on.
        """
        while not self._is_over():
            try:
                self._drain_inbox()
                self._publish_steps()
                self._gather_results()
            except (WorkerLost, WorkersHung) as cause:
                self._replace_workers(cause)
            self._emit()

    def end_requests(self, error: str) -> None:
        """Give every request that is still alive its one ending."""
        self._scheduler.fail_all(error)
        self._emit()

    # -- the four parts of a step --------------------------------------------------------------------------------------

    def _drain_inbox(self) -> None:
        for message in self._gateway.receive(MESSAGES_PER_STEP):
            if isinstance(message, Submit):
                self._on_submit(message)
            elif isinstance(message, Cancel):
                self._scheduler.cancel(message.request_id, message.reason)
            elif isinstance(message, StatsQuery):
                self._gateway.send(StatsReply(message.query_id, self._counters()))

    def _publish_steps(self) -> None:
        """Fill the pipeline: the next step is out before the tokens of the last one are back."""
        while self._recovery.is_ready:
            began = time.perf_counter()
            plan = self._scheduler.schedule()
            if plan is None:
                return
            planned = time.perf_counter()
            self._workers.publish(CONTROL.encode(plan))
            self._published.append((time.monotonic(), sum(plan.counts)))
            self.stats.schedule_us.add((planned - began) * 1e6)
            self.stats.publish_us.add((time.perf_counter() - planned) * 1e6)

    def _gather_results(self) -> None:
        """Apply the results that are there; if there are none, wait for one or for anything else to do."""
        if not self._recovery.is_ready:
            self._look_around(self._park_s())
            return
        result = self._workers.try_result() or self._spin()
        if result is None:
            self._look_around(self._park_s())
            result = self._workers.try_result()
        elif time.monotonic() - self._last_look_s > LOOK_INTERVAL_S:
            self._look_around(0.0)
        while result is not None:
            self._apply(result)
            result = self._workers.try_result()
        self._check_progress()

    def _emit(self) -> None:
        outputs = self._scheduler.take_outputs()
        if outputs is not None:
            self._gateway.send(outputs)

    # -- details -------------------------------------------------------------------------------------------------------

    def _on_submit(self, submit: Submit) -> None:
        if self._drain_deadline_s is not None:
            self._scheduler.refuse(submit.request_id, "the server is finishing its last requests before it stops")
            return
        try:
            self._scheduler.submit(submit)
        except Exception:  # whatever is wrong with one request must not end the others
            log.exception("request %d could not be taken in", submit.request_id)
            self._scheduler.refuse(submit.request_id, "internal error: the request could not be taken in")

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
        self.stats.compute_us.add(result.compute_us)
        self.stats.apply_us.add((time.perf_counter() - began) * 1e6)

    def _spin(self) -> StepResult | None:
        """On GPUs, try again for a moment: a sleep and a wake-up cost more than a short step leaves room for."""
        if not self._spin_s or not self._published:
            return None
        until = time.monotonic() + self._spin_s
        while time.monotonic() < until:
            if (result := self._workers.try_result()) is not None:
                return result
        return None

    def _park_s(self) -> float:
        if self._drain_deadline_s is None:
            return PARK_S
        return min(PARK_S, max(0.0, self._drain_deadline_s - time.monotonic()))

    def _look_around(self, timeout_s: float) -> None:
        """Sleep until something happens, and see to all that is neither a result nor a gateway message."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        self._last_look_s = time.monotonic()
        if self._signals.fd in ready:
            self._signals.clear()
        if self._gateway.process.pidfd in ready:
            self._gateway.check_alive()
        if any(process.pidfd in ready for process in self._workers.processes):
            self._workers.check_deaths()
        if any(socket in ready for socket in self._workers.sockets):
            self._workers.read_all()
        if not self._recovery.is_ready:
            self._await_workers()
        running = self._scheduler.num_running
        self._notifier.serving(running, self._scheduler.num_live - running, self._waited_s())

    def _waited_s(self) -> float:
        """Give how long the workers have been at the oldest step, 0 if they have none."""
        if not self._published:
            return 0.0
        return time.monotonic() - max(self._last_result_s, self._published[0][0])

    def _check_progress(self) -> None:
        if not self._published:
            return
        waited_s, num_tokens = self._waited_s(), self._published[0][1]
        if waited_s > (limit_s := self._step_deadline.seconds_for(num_tokens)):
            step = f"a step of {num_tokens} tokens"
            raise WorkersHung(
                f"the workers hang: no result of {step} for {waited_s:.1f} s, longer than {limit_s:.1f} s"
            )

    # -- failures and endings ------------------------------------------------------------------------------------------

    def _replace_workers(self, cause: Exception) -> None:
        """Throw the worker group away and start another one; what ran waits until it is there."""
        if self._recovery.is_ready:
            log.warning("%d running requests wait for new workers", self._scheduler.num_running)
            self._scheduler.forget_workers(str(cause))
            self._published.clear()
        self._recovery.begin(cause)
        self._workers = self._recovery.group
        self._watch()
        self._tell_state()

    def _await_workers(self) -> None:
        """Lead the new workers on; when they are ready, everything is replayed."""
        self._recovery.advance()
        if not self._recovery.is_ready:
            return
        self._scheduler.resume(self._workers.epoch, self._recovery.num_blocks)
        limits = self._scheduler.limits
        self._info = replace(self._info, max_seq_len=limits.max_seq_len, kv_tokens=limits.kv_tokens)
        self._tell_state()
        log.info("recovered in %.2f s; %d requests go on", self._recovery.last_s, self._scheduler.num_live)

    def _tell_state(self) -> None:
        self._gateway.send(replace(self._info, state=self._state))

    @property
    def _state(self) -> str:
        if self._drain_deadline_s is not None:
            return "draining"
        return "ready" if self._recovery.is_ready else "recovering"

    def _watch(self) -> None:
        """Poll what there is now."""
        self._poller = zmq.Poller()
        sources = (self._signals.fd, self._gateway.socket, self._gateway.process.pidfd, *self._workers.sockets)
        for source in (*sources, *(process.pidfd for process in self._workers.processes)):
            self._poller.register(source, zmq.POLLIN)

    def _counters(self) -> dict[str, float]:
        counters = self.stats.counters(self._scheduler, time.monotonic() - self._last_result_s)
        return counters | {"restarts": float(self._recovery.limit.count), "last_recovery_s": self._recovery.last_s}

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
        self._tell_state()
