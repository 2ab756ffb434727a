"""One server: start-up, main loop, shutdown, from top to bottom."""

import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace

import zmq

from mgpu import __version__
from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.engine.engine import Engine
from mgpu.orchestrator.engine.polling import poller_of
from mgpu.orchestrator.errors import UserError, with_traceback
from mgpu.orchestrator.host.reload import Reloadable, Reloader
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.host.signals import StopSignals
from mgpu.orchestrator.host.systemd import Notifier
from mgpu.orchestrator.placement.options import check_batch_tokens
from mgpu.orchestrator.processes.gateway_process import GatewayLost, GatewayProcess
from mgpu.orchestrator.processes.restarts import RestartLimit, TooManyRestarts, WorkerRecovery
from mgpu.orchestrator.processes.standby import Standby
from mgpu.orchestrator.processes.worker_group import WorkerGroup, WorkerLost
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.orchestrator.startup_log import ProgressBar, log_ready
from mgpu.protocol.discovery import RunningServer
from mgpu.protocol.internal.gateway_messages import EngineInfo, GatewayReady, StateKnown

log = logging.getLogger(__name__)

POLL_S = 0.25
RELOAD_SILENCE_S = 60.0
RELOAD_FACTOR = 10.0
TRIAL_STEP_SHARE = 0.5
"""A prompt's part of the warm-up, which takes two of them and four decoding steps."""
FAILED_STOP_S = 1.0
"""What healthy ranks get to leave by themselves after a failure."""
GATEWAY_STOP_S = 2.0
"""What the gateway gets at least: it has the last words for every client."""


class StartTimeout(Exception):
    """Nothing moved for too long while the server started."""


class _Stopped(Exception):
    """A signal came before the server was ready."""


class Server:
    """Everything that one `mgpu-launch serve` starts. `run` blocks until it is over and leaves nothing behind."""

    def __init__(
        self,
        config: ServerConfig,
        notifier: Notifier | None = None,
        read_again: Callable[[], Reloadable] | None = None,
    ) -> None:
        """``read_again`` gives what SIGHUP takes into use; it may raise UserError."""
        check_batch_tokens(config.limits.max_batch_tokens, config.limits.max_rows)
        self._config = config
        self._notifier = notifier or Notifier()
        self._reloader = Reloader(config.keys, read_again)
        self._began_s = time.monotonic()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._signals = StopSignals()
        self._runtime: RuntimeDir | None = None
        self._gateway: GatewayProcess | None = None
        self._workers: WorkerGroup | None = None
        self._standby = Standby(self._new_group, config.restarts.standby, config.restarts.standby_delay_s)
        self._recovery: WorkerRecovery | None = None
        self._engine: Engine | None = None
        self._info = EngineInfo("starting", config.limits.max_seq_len, 0, config.layout_table)

    def run(self) -> int:
        """Serve until a signal or a failure. Gives the exit status: 0, 1, minus the signal (see `end_process`), or 78
        when the model's files are at fault, so that nobody starts it again as it is.

        Call it from the main thread. UserError, before it is ready only, when there is no place for the sockets.
        """
        failure, status = "", 1
        is_open = False
        with self._signals:
            try:
                self._start()
                is_open = True
                assert self._engine is not None
                self._engine.run()
            except _Stopped:
                log.info("stopped while starting")
            except (WorkerLost, GatewayLost, TooManyRestarts, StartTimeout) as cause:
                failure = str(cause)
                if not is_open and isinstance(cause, WorkerLost | GatewayLost) and cause.is_mistake:
                    status = UserError.exit_code
                log.error("%s", with_traceback(cause))
            except UserError as error:
                failure = str(error)
                if not is_open:
                    raise
                # What could be used once is not a mistake of the configuration: another start may help.
                log.error("%s", failure)
            except Exception as bug:  # the process edge: whatever broke, clients get their endings and nothing stays
                failure = f"internal error: {bug!r}"
                log.exception("the server ends: %s", failure)
            finally:
                self._shut_down(failure)
        if failure:
            return status
        return -self._signals.received[0] if self._signals.received else 0

    # -- start-up ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        config = self._config
        self._runtime = RuntimeDir()
        self._gateway = GatewayProcess(self._context, self._runtime, config)
        self._workers = self._standby.start_group(epoch=0)
        log.info("starting %d worker(s) for %s", config.layout.placement.world_size, config.model_name)
        num_blocks = self._load_workers(self._workers)
        self._wait_until(lambda: bool(self._gateway and self._gateway.is_ready), "the gateway to be ready")
        self._open(num_blocks)

    def _new_group(self, epoch: int) -> WorkerGroup:
        assert self._runtime is not None
        return WorkerGroup(self._context, self._runtime, self._config, epoch)

    def _load_workers(self, workers: WorkerGroup) -> int:
        """Lead the workers from their start to `Ready`; gives the size of the pool in blocks."""
        world_size = self._config.layout.placement.world_size
        bar = ProgressBar()
        try:
            self._wait_until(
                lambda: len(workers.loaded) == world_size,
                "all workers to load",
                lambda: bar.show(workers.progress.values(), world_size),
            )
        finally:
            bar.close()
        num_blocks = workers.allocate_cache()
        self._wait_until(lambda: len(workers.ready) == world_size, "all workers to be ready")
        return num_blocks

    def _wait_until(self, done: Callable[[], bool], what: str, each_time: Callable[[], None] = lambda: None) -> None:
        """Take in messages until ``done``. StartTimeout when nothing comes for long; any failure ends it at once."""
        assert self._workers is not None
        assert self._gateway is not None
        last_news_s = time.monotonic()
        while not done():
            if poller_of(self._signals, self._gateway, self._workers).poll(int(POLL_S * 1000)):
                last_news_s = time.monotonic()
            elif time.monotonic() - last_news_s > self._config.timeouts.start_timeout_s:
                raise StartTimeout(f"waited {self._config.timeouts.start_timeout_s:g} s for {what}")
            self._take_news(self._workers, self._gateway)
            each_time()

    def _take_news(self, workers: WorkerGroup, gateway: GatewayProcess) -> None:
        self._signals.clear()
        if self._signals.received:
            raise _Stopped
        workers.read_all()
        workers.check_deaths()
        try:
            self._read_gateway(gateway)
        except GatewayLost as lost:
            if not lost.caused_by_clients:
                raise
            log.warning("%s; starting another one", lost)
            gateway.restart(self._info)
        self._notifier.loading(workers.progress.values(), self._config.layout.placement.world_size)

    def _read_gateway(self, gateway: GatewayProcess) -> None:
        for message in gateway.receive(limit=64):
            if isinstance(message, GatewayReady):
                gateway.send(self._info)
            elif not isinstance(message, StateKnown):
                log.warning("ignored %s: the engine is not ready", type(message).__name__)
            if gateway.known_state == "ready":
                break  # what follows is for the engine
        gateway.check_alive()

    def _open(self, num_blocks: int) -> None:
        """Become ready: build the engine, tell the gateway, the log and whoever looks for servers."""
        assert self._workers is not None
        assert self._gateway is not None
        assert self._runtime is not None
        config = self._config
        limits = Limits(
            num_blocks=num_blocks,
            block_size=config.limits.block_size,
            max_rows=config.limits.max_rows,
            max_batch_tokens=config.limits.max_batch_tokens,
            max_seq_len=min(config.limits.max_seq_len, num_blocks * config.limits.block_size),
            num_stages=config.layout.placement.num_stages,
            vocab_size=config.facts.vocab_size,
            prefix_cache=config.prefix_cache,
        )
        self._info = EngineInfo("ready", limits.max_seq_len, limits.kv_tokens, config.layout_table)
        restarts = RestartLimit(config.restarts.max_restarts, config.restarts.restart_window_s)
        self._recovery = WorkerRecovery(self._workers, self._standby, num_blocks, restarts, self._reload_silence_s())
        self._engine = Engine(
            Scheduler(limits),
            self._recovery,
            self._gateway,
            self._signals,
            self._info,
            self._notifier,
            self._reloader,
            self._runtime,
            spin_s=config.spin_s,
            gateway_restarts=RestartLimit(config.restarts.max_restarts, config.restarts.restart_window_s),
            hang_timeout_s=config.timeouts.hang_timeout_s,
            resume_timeout_s=config.timeouts.resume_timeout_s,
            drain_timeout_s=config.timeouts.drain_timeout_s,
        )
        if config.device_kind == "cpu":  # on GPUs the trial compiles kernels, which says nothing of later steps
            trials = self._workers.ready.values()
            self._engine.expect_steps(
                max(ready.step_tokens for ready in trials),
                max(ready.phase_s.get("warmup", 0.0) for ready in trials) * TRIAL_STEP_SHARE,
            )
        endpoint = self._gateway.endpoint
        log_ready(config, limits, self._workers.ready, time.monotonic() - self._began_s)
        self._tell_gateway(self._gateway)
        log.info("listening on %s", endpoint)
        self._runtime.announce(RunningServer(endpoint, os.getpid(), config.model_name, __version__))
        self._notifier.ready(f"serving {config.model_name} on {endpoint}")
        # What exists now stays: the collector need not look at it again between steps.
        gc.collect()
        gc.freeze()

    def _tell_gateway(self, gateway: GatewayProcess) -> None:
        """Let the gateway know that the engine is ready before anyone can find the server: no first request is refused.

        One that does not answer is not waited for. What fails meanwhile is left to the engine, which can replace it.
        """
        gateway.send(self._info)
        deadline_s = time.monotonic() + self._config.timeouts.gateway_timeout_s
        while gateway.known_state != self._info.state:
            if self._signals.received:
                raise _Stopped
            if time.monotonic() > deadline_s:
                silence_s = self._config.timeouts.gateway_timeout_s
                log.warning("the gateway has not answered for %g s; it may refuse the first requests", silence_s)
                return
            gateway.socket.poll(int(POLL_S * 1000))
            try:
                self._read_gateway(gateway)
            except GatewayLost:
                return

    def _reload_silence_s(self) -> float:
        """Give how long workers that load again may say nothing: ten times what all of the first start took."""
        usual_s = RELOAD_FACTOR * (time.monotonic() - self._began_s)
        return min(self._config.timeouts.start_timeout_s, max(RELOAD_SILENCE_S, usual_s))

    # -- shutdown ------------------------------------------------------------------------------------------------------

    def _shut_down(self, failure: str) -> None:
        """End requests, then processes, within one shared deadline; then remove every file. Never raises for a peer."""
        self._notifier.stopping(f"failed: {failure}" if failure else "stopping the workers")
        self._signals.clear()  # readable from now on: one more signal, so stop at once
        patience_s = FAILED_STOP_S if failure else self._config.timeouts.stop_timeout_s
        deadline_s = time.monotonic() + (0.0 if len(self._signals.received) > 1 else patience_s)
        error = f"the server failed: {failure}" if failure else "the server stopped before this was finished"
        with contextlib.ExitStack() as cleanup:  # from the last line up, and all of it whatever fails on the way
            cleanup.callback(log.info, "stopped")
            cleanup.callback(self._context.destroy, linger=0)
            if self._runtime is not None:
                cleanup.callback(self._runtime.close)
            if self._gateway is not None:
                cleanup.callback(self._gateway.stop, max(deadline_s, time.monotonic() + GATEWAY_STOP_S))
            workers = self._workers if self._recovery is None else self._recovery.group
            cleanup.callback(self._standby.close)
            if workers is not None:
                cleanup.callback(workers.stop, deadline_s, self._signals.fd)
            self._say_goodbye(error)

    def _say_goodbye(self, error: str) -> None:
        if self._gateway is None or not self._gateway.is_ready:
            return
        try:
            if self._engine is not None:
                self._engine.end_requests(error)
            self._gateway.send(replace(self._info, state="stopped"))
        except GatewayLost as lost:
            log.warning("clients could not be told: %s", lost)
