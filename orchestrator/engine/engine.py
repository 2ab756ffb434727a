"""The engine: the one loop of a server, from its start to its end.

A start, a failure and the end are told here from top to bottom: `run`, `_update_state`, `_replace_workers`,
`_replace_gateway`, `_replace_http`, `_end`. Each turn of the loop takes messages in, publishes steps until the pipeline
is full, waits, and applies the results that have come. A turn may publish no step or several.

Example, with one stage: a turn takes in a submission and publishes two plans, step 7 for the prompt and step 8 for the
token after it, then sleeps. The result of step 7 wakes it, and its token goes to the gateway. The next turn publishes
step 9.
"""

import gc
import logging
import os
import time
from typing import Any

import zmq

from mgpu import __version__
from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.engine.gateway_bridge import GatewayBridge
from mgpu.orchestrator.engine.gpu_memory import GpuMemory
from mgpu.orchestrator.engine.life_cycle import LifeCycle, ServerState
from mgpu.orchestrator.engine.polling import poller_of
from mgpu.orchestrator.engine.steps import StepPipeline
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.reload import Reloader
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.host.signals import Signals
from mgpu.orchestrator.host.systemd import Notifier
from mgpu.orchestrator.processes.failures import GatewayLost, HttpLost, ProcessFailure, WorkersHung, ending_of
from mgpu.orchestrator.processes.gateway_process import GatewayProcess
from mgpu.orchestrator.processes.http_process import HttpProcess
from mgpu.orchestrator.processes.worker_processes import WorkerProcesses
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.orchestrator.startup_log import ProgressBar, log_ready, recovered_line
from mgpu.protocol.discovery import RunningServer
from mgpu.protocol.internal.counted import counted
from mgpu.protocol.internal.gateway_messages import EngineInfo

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.01
"""How often signals and processes are looked at while results keep coming without a wait."""
LONGEST_SLEEP_S = 1.0
"""Longest sleep; every deadline is checked at least this often."""
STANDSTILL_S = LONGEST_SLEEP_S + 1.0
"""After a longer time between two looks this process was stopped itself; the workers are not to blame."""
FAILED_STOP_S = 1.0
"""Time that healthy ranks get to leave by themselves after a failure."""
GATEWAY_STOP_S = 2.0
"""Least time that the gateway gets to leave: it passes the last messages on to the clients."""


class Engine:
    """Connects scheduler, workers and gateway; runs in the main thread, without asyncio."""

    def __init__(
        self,
        config: ServerConfig,
        scheduler: Scheduler,
        gateway: GatewayProcess,
        http: HttpProcess,
        workers: WorkerProcesses,
        signals: Signals,
        runtime: RuntimeDir,
        notifier: Notifier,
        reloader: Reloader,
    ) -> None:
        """``scheduler`` has no blocks yet, and the ``workers`` are not started."""
        self._config = config
        self._scheduler = scheduler
        self._gateway = gateway
        self._http = http
        self._workers = workers
        self._signals = signals
        self._runtime = runtime
        self._notifier = notifier
        self._reloader = reloader
        self._life = LifeCycle()
        timeouts = config.timeouts
        self._steps = StepPipeline(scheduler, workers, config.spin_s, timeouts.hang_timeout_s)
        self._gpu_memory = GpuMemory(config.gpu_uuids)
        self._bridge = GatewayBridge(
            self._life, scheduler, self._steps, gateway, workers, timeouts.resume_timeout_s, self._gpu_memory
        )
        self._progress = ProgressBar(config.layout.placement.world_size)
        self._began_s = self._looked_s = time.monotonic()
        self._is_announced = False
        """Clients can find the server. What fails from now on is never a mistake of the user."""
        self._announce_by_s = self._drain_until_s = 0.0
        self._drain_timeout_s = timeouts.drain_timeout_s
        self._poller = zmq.Poller()

    def run(self) -> int:
        """Serve until a signal or a failure; return the exit status. See `Server.run`."""
        failure: Exception | None = None
        try:
            self._start()
            while not self._has_stopped():
                try:
                    self._bridge.take_in()
                    if not self._is_announced:  # the announcement may have waited for a message of the gateway only
                        self._update_state()
                        if self._has_stopped():  # a signal has ended the start
                            break
                    self._steps.publish()
                    self._bridge.emit()  # refusals and cancellations do not wait for the next result
                    self._wait()  # the only place that sleeps
                    self._steps.apply()
                    self._bridge.emit()
                except GatewayLost as lost:
                    self._replace_gateway(lost)
                except HttpLost as lost:
                    self._replace_http(lost)
                except ProcessFailure as lost:
                    self._replace_workers(lost)
                self._update_state()
        except Exception as cause:  # the process edge: whatever broke, clients get their endings and nothing stays
            failure = cause
        return self._end(failure)

    # -- start and state -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._workers.start()
        self._make_poller()
        world_size = self._config.layout.placement.world_size
        log.info("mgpu %s: starting %s for %s", __version__, counted(world_size, "worker"), self._config.model_name)

    def _update_state(self) -> None:
        """Follow the processes and the signals; tell gateway, systemd and log about a change."""
        state = self._life.state
        if self._signals.received:
            self._drain_or_stop(state)
        elif state is ServerState.STARTING:
            if self._workers.is_ready and self._gateway.is_ready:
                self._become_ready()
        elif self._workers.is_ready is not (state is ServerState.READY):
            self._enter(ServerState.READY if self._workers.is_ready else ServerState.RECOVERING)
        elif not self._is_announced and state is ServerState.READY:
            self._announce_when_known()

    def _has_stopped(self) -> bool:
        return self._life.state is ServerState.STOPPED

    def _enter(self, state: ServerState) -> None:
        self._life.enter(state)
        if state is ServerState.READY:
            self._announce_by_s = time.monotonic() + self._config.timeouts.gateway_timeout_s
        self._gateway.tell(self._info())

    def _info(self) -> EngineInfo:
        limits = self._scheduler.limits
        return EngineInfo(self._life.state.value, limits.max_seq_len, limits.kv_tokens, self._config.layout_table)

    def _become_ready(self) -> None:
        """Take requests from now on. The gateway hears it before anybody can find the server."""
        self._progress.close()
        ready = self._workers.group.ready
        # On GPUs a warm-up compiles kernels: it says nothing of later steps.
        on_cpu = self._config.device_kind == "cpu" or self._config.layout.waits_for_cpu
        self._steps.begin(ready.values() if on_cpu else ())
        log_ready(self._config, self._scheduler.limits, ready, time.monotonic() - self._began_s)
        self._enter(ServerState.READY)

    def _announce_when_known(self) -> None:
        """Let clients find the server once the gateway acts on the state ready: no first request is refused.

        A gateway that does not answer is not waited for.
        """
        config, endpoint = self._config, self._gateway.endpoint
        late = [] if self._gateway.known_state == ServerState.READY else ["the gateway"]
        late += [] if self._http.is_ready else ["the HTTP process"]
        if late:
            if time.monotonic() <= self._announce_by_s:
                return
            who, silence_s = " and ".join(late), config.timeouts.gateway_timeout_s
            log.warning("%s has not answered for %g s; it may refuse the first requests", who, silence_s)
        log.info("listening on %s", endpoint)
        if self._http.url:
            log.info("HTTP (OpenAI-compatible) on %s", self._http.url)
        server = RunningServer(endpoint, os.getpid(), config.model_name, __version__, self._http.url)
        self._runtime.announce(server)
        self._notifier.ready(f"serving {config.model_name} on {endpoint}")
        self._gateway.watch()
        self._is_announced = True
        # What exists now stays: the collector need not look at it again between steps.
        gc.collect()
        gc.freeze()

    def _drain_or_stop(self, state: ServerState) -> None:
        """After one signal running requests may finish; after a second one, or in time, the server stops."""
        num_live, has_second = self._scheduler.num_live, len(self._signals.received) > 1
        if state is ServerState.STARTING:
            log.info("stopped while starting")
            self._life.enter(ServerState.STOPPED)
            return
        if state is not ServerState.DRAINING:
            if num_live:
                log.info(
                    "stopping: %s may take up to %g s to finish", counted(num_live, "sequence"), self._drain_timeout_s
                )
            self._drain_until_s = time.monotonic() + self._drain_timeout_s
            self._notifier.stopping("finishing the last requests")
            self._enter(ServerState.DRAINING)
        is_over = time.monotonic() >= self._drain_until_s
        if num_live and has_second:
            log.warning("a second signal: ending %s", counted(num_live, "sequence"))
        elif num_live and is_over:
            ended = counted(num_live, "sequence")
            log.warning("the drain timeout of %g s is over: ending %s", self._drain_timeout_s, ended)
        if has_second or is_over or not num_live:
            self._life.enter(ServerState.STOPPED)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Return when there is something to do: a result, a message of the gateway, a signal, or news of a process."""
        sleep_s = self._steps.spin() if self._workers.is_ready else LONGEST_SLEEP_S
        if sleep_s or time.monotonic() - self._looked_s > LOOK_INTERVAL_S:
            self._handle(self._sleep(min(sleep_s, self._longest_sleep_s())))

    def _longest_sleep_s(self) -> float:
        longest_s = min(LONGEST_SLEEP_S, self._gateway.pause_left_s(), self._http.pause_left_s() or LONGEST_SLEEP_S)
        if self._life.state is not ServerState.DRAINING:
            return longest_s
        return min(longest_s, max(0.0, self._drain_until_s - time.monotonic()))

    def _sleep(self, timeout_s: float) -> dict[Any, int]:
        """Run the periodic work, then sleep until something happens; return the events."""
        self._run_periodic_work()  # done before sleeping, so that an arriving result is not delayed by it
        events = dict(self._poller.poll(int(timeout_s * 1000)))
        if (now_s := time.monotonic()) - self._looked_s > STANDSTILL_S:
            self._steps.excuse_standstill(now_s)
        self._looked_s = now_s
        return events

    def _handle(self, events: dict[Any, int]) -> None:
        """Handle signals, deaths, and messages of workers that load. `run` reads results and gateway messages."""
        if self._signals.fd in events:
            self._signals.clear()
        if self._life.state is not ServerState.STARTING and self._signals.take_reload():
            self._reload()
        self._gateway.notice_death(events)
        if self._http.notice(events):
            self._make_poller()
        if self._workers.advance(events):
            self._scheduler.use_workers(self._workers.group.epoch, self._workers.pool)
            if self._life.state is not ServerState.STARTING:
                took_s = self._workers.last_recovery_s
                ready = self._workers.group.ready.values()
                log.info("%s", recovered_line(took_s, self._scheduler.num_live, ready))

    def _run_periodic_work(self) -> None:
        """Watchdog, journal, runtime folder, standby workers and systemd: each acts when its own time has come."""
        if self._gateway.start_if_due() | self._http.start_if_due(self._gateway.endpoint):  # after a pause
            self._make_poller()
        self._gateway.check_watchdog()
        if self._life.state is ServerState.STARTING:
            progress = self._workers.group.progress.values()
            self._progress.show(progress)
            self._notifier.loading(progress, self._config.layout.placement.world_size)
            return
        self._bridge.run_periodic_work()
        self._runtime.restore_if_removed()
        running, live = self._scheduler.num_running, self._scheduler.num_live
        if self._workers.is_ready:
            self._workers.prepare_standby()
            self._notifier.serving(running, live - running, self._steps.waited_s())
        else:
            self._notifier.recovering(live)

    def _reload(self) -> None:
        self._notifier.reloading("reading the configuration again")
        try:
            values = self._reloader.read()
            if values is not None:
                self._drain_timeout_s = values.drain_timeout_s
                self._http.reload(values.api_keys)
                self._gateway.reload(values.keys, values.client_limits)  # GatewayLost: the next gateway gets them
        finally:
            self._notifier.reloaded()

    def _make_poller(self) -> None:
        """Watch the current processes: call it after each replacement."""
        self._poller = poller_of(self._signals, self._gateway, self._http, self._workers.group)

    # -- failures and the end ------------------------------------------------------------------------------------------

    def _replace_workers(self, failure: ProcessFailure) -> None:
        """Throw the worker group away and start another one; sequences that ran wait until it is ready."""
        if self._life.state is ServerState.STARTING and not self._workers.may_avoid(failure):
            if isinstance(failure, WorkersHung):
                self._workers.group.kill_with_stacks()
            raise failure
        was_ready, num_waiting = self._workers.is_ready, 0
        if was_ready:
            num_waiting = self._scheduler.forget_workers(str(failure))
            self._steps.forget()
        self._workers.replace(failure)
        if was_ready:
            log.warning("new workers are needed for %s", counted(num_waiting, "running sequence"))
        self._make_poller()

    def _replace_gateway(self, failure: GatewayLost) -> None:
        """Start another gateway on the same endpoint; requests whose clients can resume them go on meanwhile."""
        if self._life.state is ServerState.STARTING and not failure.caused_by_clients:
            raise failure
        last_messages = self._gateway.replace(failure, self._info())
        self._bridge.on_gateway_replaced(last_messages)
        self._make_poller()

    def _replace_http(self, failure: HttpLost) -> None:
        """Let another HTTP process follow, after a pause. Its requests are cancelled: their clients have lost them."""
        self._http.replace(failure)
        self._make_poller()

    def _end(self, failure: Exception | None) -> int:
        """End the server and return its exit status; raise a UserError that came before the announcement.

        `_shut_down` does the work: it ends the requests, then the processes, within one shared deadline. `Server.run`
        removes what is left.
        """
        self._progress.close()
        if not self._has_stopped():
            self._life.enter(ServerState.STOPPED)
        if failure is None:
            self._shut_down("")
            return -self._signals.received[0]
        text, status = ending_of(failure, self._is_announced)
        self._shut_down(text)
        if isinstance(failure, UserError) and not self._is_announced:
            raise failure
        return status

    def _shut_down(self, failure: str) -> None:
        self._notifier.stopping(f"failed: {failure}" if failure else "stopping the workers")
        self._signals.ignore_reloads()
        self._signals.clear()  # if it is readable from now on, another signal to stop has come: stop at once
        patience_s = FAILED_STOP_S if failure else self._config.timeouts.stop_timeout_s
        began_s = time.monotonic()
        deadline_s = began_s + (0.0 if len(self._signals.received) > 1 else patience_s)
        self._notify_clients(
            f"the server failed: {failure}" if failure else "the server stopped before this was finished"
        )
        self._workers.stop(deadline_s, self._signals.fd)
        self._gateway.stop(max(deadline_s, began_s + GATEWAY_STOP_S))
        self._http.stop()

    def _notify_clients(self, error: str) -> None:
        try:
            self._bridge.fail_all(error)
            self._gateway.send(self._info())
        except GatewayLost as lost:
            log.warning("clients could not be told: %s", lost)
