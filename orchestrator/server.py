"""One server: everything that one `mgpu-launch serve` starts, nested so that nothing of it is left behind."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace

import zmq

from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.engine.engine import Engine
from mgpu.orchestrator.host.listening import HttpListener
from mgpu.orchestrator.host.reload import Reloadable, Reloader
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.host.signals import Signals
from mgpu.orchestrator.host.systemd import Notifier
from mgpu.orchestrator.hosts.host_group import HostGroup
from mgpu.orchestrator.hosts.hosts import Hosts
from mgpu.orchestrator.processes.child_process import ProcessStartError
from mgpu.orchestrator.processes.failures import ending_of
from mgpu.orchestrator.processes.gateway_process import GatewayProcess
from mgpu.orchestrator.processes.http_process import HttpProcess, front_keys_of
from mgpu.orchestrator.processes.worker_processes import WorkerProcesses
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.protocol.keys import new_pair

log = logging.getLogger(__name__)


class Server:
    """Signals, folder, gateway, HTTP, workers, and the engine that connects them."""

    def __init__(
        self,
        config: ServerConfig,
        notifier: Notifier | None = None,
        read_again: Callable[[], Reloadable] | None = None,
        listener: HttpListener | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        """``read_again`` returns what SIGHUP takes into use; it may raise UserError. No ``listener``: no HTTP.

        ``hosts`` have joined and run the workers; None: they are processes of this machine.
        """
        if config.keys is not None and listener is not None:
            config = replace(config, own_pair=new_pair())
        self._config = config
        self._notifier = notifier or Notifier()
        self._listener = listener
        self._new_group = None if hosts is None else lambda epoch: HostGroup(hosts, config, epoch)
        used = Reloadable(
            config.keys, config.client_limits, config.timeouts.drain_timeout_s, api_keys=config.http.api_keys
        )
        self._reloader = Reloader(config.keys, read_again, config.http.api_keys, used)
        limits = Limits(  # raises when no step could ever hold all rows
            **asdict(config.limits),
            num_blocks=0,  # until the workers have said how many they can hold
            sight=config.facts.sight,
            num_stages=config.layout.placement.num_stages,
            vocab_size=config.facts.vocab_size,
            prefix_cache=config.prefix_cache,
        )
        self._scheduler = Scheduler(limits)

    def run(self) -> int:
        """Serve until a signal or a failure; return the exit status: minus the signal (see `end_process`), 1, or 78.

        78 says that the model's files or the options are at fault, so that the service manager does not start the
        server again as it is. UserError, with its own ``exit_code``, before clients can find the server, such as when
        there is no place for the sockets. Call it from the main thread, once.
        """
        config, has_begun = self._config, False
        try:
            with (
                Signals() as signals,
                zmq.Context() as context,
                RuntimeDir() as folder,
                GatewayProcess(context, folder, config) as gateway,
                HttpProcess(
                    self._listener, config.http, front_keys_of(config.keys, config.own_pair), config.http_command
                ) as http,
                WorkerProcesses(context, folder, config, self._new_group) as workers,
            ):
                has_begun = True
                engine = Engine(
                    config, self._scheduler, gateway, http, workers, signals, folder, self._notifier, self._reloader
                )
                return engine.run()
        except ProcessStartError as error:  # the first gateway's; the engine handles the others
            text, status = ending_of(error, is_announced=False)
            self._notifier.stopping(f"failed: {text}")
            return status
        except Exception as error:  # systemd shows why; who called this prints it
            self._notifier.stopping(f"failed: {error}")
            raise
        finally:
            if has_begun:
                log.info("stopped")
