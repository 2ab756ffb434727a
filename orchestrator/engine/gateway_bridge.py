"""Connect the gateway with the scheduler: submissions, cancellations and questions in, outputs out.

A request outlives the gateway that brought it. The journal knows it by its session and its client's id, and a new
gateway asks for what has been said so far.
"""

import logging
import time

from mgpu.orchestrator.engine.free_memory import FreeMemory
from mgpu.orchestrator.engine.gpu_memory import GpuMemory
from mgpu.orchestrator.engine.life_cycle import LifeCycle, ServerState
from mgpu.orchestrator.engine.resume_journal import Journal
from mgpu.orchestrator.engine.steps import StepPipeline
from mgpu.orchestrator.processes.gateway_process import GatewayProcess
from mgpu.orchestrator.processes.worker_processes import WorkerProcesses
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.protocol.internal.counted import counted
from mgpu.protocol.internal.gateway_messages import (
    DRAINING,
    DUPLICATE,
    Cancel,
    Floods,
    GatewayReady,
    RecordQuery,
    RecordReply,
    Resumable,
    StateKnown,
    StatsQuery,
    StatsReply,
    Submit,
    WakeUp,
)
from mgpu.protocol.internal.worker_messages import Vocabulary

log = logging.getLogger(__name__)

MESSAGES_PER_STEP = 256
"""Most gateway messages taken in between two steps, so that a flood of them does not hold up the workers."""


class GatewayBridge:
    """Handles the messages of the gateway, and sends it what the scheduler puts out."""

    def __init__(
        self,
        life: LifeCycle,
        scheduler: Scheduler,
        steps: StepPipeline,
        gateway: GatewayProcess,
        workers: WorkerProcesses,
        resume_timeout_s: float,
        gpu_memory: GpuMemory,
    ) -> None:
        self._life = life
        self._scheduler = scheduler
        self._steps = steps
        self._gateway = gateway
        self._workers = workers
        self._journal, self._memory = Journal(), FreeMemory()
        self._resume_timeout_s = resume_timeout_s
        self._gpu_memory = gpu_memory
        self._claim_deadline_s: float | None = None
        """Until when clients may come back after the gateway was lost."""

    def take_in(self) -> None:
        """Read what the gateway has sent. GatewayLost."""
        for message in self._gateway.receive(MESSAGES_PER_STEP):
            self._take(message)

    def emit(self) -> None:
        """Send what has happened since the last call. GatewayLost."""
        outputs = self._scheduler.take_outputs()
        if outputs is not None:
            self._journal.note(outputs)
            self._gateway.send(outputs)

    def run_periodic_work(self) -> None:
        """End what no client has come back for in time, and forget what ended long ago."""
        if self._claim_deadline_s is not None and time.monotonic() > self._claim_deadline_s:
            self._claim_deadline_s = None
            for sequence_id in self._journal.unclaimed():
                self._scheduler.cancel(sequence_id, "cancelled")
        self._journal.prune()
        self._memory.look(self._scheduler.num_live)

    def on_gateway_replaced(self, last_messages: list[object]) -> None:
        """Take in what the old gateway had still sent, then end what nobody can resume."""
        for message in last_messages:
            if not isinstance(message, WakeUp):  # the request that it announced went down with the gateway
                self._take(message)
        for sequence_id in self._scheduler.live_ids():
            if not self._journal.knows(sequence_id):
                self._scheduler.cancel(sequence_id, "cancelled")
        self._scheduler.shares.floods = frozenset()
        self._journal.lose_clients()
        self._claim_deadline_s = None

    def fail_all(self, error: str) -> None:
        """End every request that is still alive. GatewayLost."""
        self._scheduler.fail_all(error)
        self.emit()

    def _take(self, message: object) -> None:
        if isinstance(message, Floods):
            self._scheduler.shares.floods = frozenset(message.owners)
        elif self._life.state is ServerState.STARTING:
            if not isinstance(message, GatewayReady | StateKnown):
                log.warning("ignored %s: the engine is not ready", type(message).__name__)
        elif isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Resumable):
            self._open_resumable(message)
        elif isinstance(message, Vocabulary):
            self._steps.vocabulary = message
        elif isinstance(message, WakeUp):
            self._steps.stay_awake()
        elif isinstance(message, Cancel):
            self._scheduler.cancel(message.sequence_id, message.reason)
        elif isinstance(message, StatsQuery):
            self._gateway.send(StatsReply(message.query_id, self._counters()))
        elif isinstance(message, RecordQuery):
            self._answer_resume(message)
        elif isinstance(message, GatewayReady):
            self._claim_deadline_s = time.monotonic() + self._resume_timeout_s
            log.info("the gateway is back; clients may resume %s", counted(self._scheduler.num_live, "sequence"))

    def _submit(self, submit: Submit) -> None:
        if self._life.state is ServerState.DRAINING:
            self._scheduler.refuse(submit.sequence_id, DRAINING)
            return
        try:
            self._scheduler.submit(submit, time.monotonic())
        except Exception:  # whatever is wrong with one request must not end the others
            log.exception("sequence %d could not be taken in", submit.sequence_id)
            self._scheduler.refuse(submit.sequence_id, "internal error: the request could not be taken in")

    def _open_resumable(self, message: Resumable) -> None:
        if not self._journal.open(message):
            for submit in message.submits:
                self._scheduler.refuse(submit.sequence_id, DUPLICATE)
            return
        for submit in message.submits:
            self._submit(submit)
            self._journal.attach(submit.sequence_id, self._scheduler.find(submit.sequence_id))

    def _answer_resume(self, message: RecordQuery) -> None:
        self.emit()  # what is said so far is part of the answer; what is said later continues it
        name = (message.session, message.request_id)
        self._gateway.send(RecordReply(message.query_id, *self._journal.look_up(*name, message.known, message.offsets)))

    def _counters(self) -> dict[str, float]:
        return self._steps.counters() | {
            "restarts": float(self._workers.restarts.count),
            "last_recovery_s": self._workers.last_recovery_s,
            "loaded_bytes": float(self._workers.loaded_bytes),
            "gateway_restarts": float(self._gateway.restarts.count),
            "gateway_restarts_counted": float(self._gateway.restarts.counted),
            **self._gpu_memory.counters(),
        }
