"""A server for the fault tests whose processes can be found, hurt and measured."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.chaos.load import STANDSTILL_S, Standstill
from bench.waiting import wait_until
from mgpu import Client
from mgpu.launch.server_process import ServerProcess
from mgpu.protocol.front.server_messages import Health


@dataclass(frozen=True)
class ServerOptions:
    """What server to test."""

    model: str = "demo"
    workers: int | None = 3
    """None: as ``more`` says."""
    hang_timeout_s: float = 10.0
    kv_memory: str = "128MiB"
    """Per worker, and little, so that the whole pool has been used after a few minutes and its pages count."""
    more: tuple[str, ...] = ("--device", "cpu", "--dtype", "float32", "--max-seq-len", "512")
    environ: Mapping[str, str] | None = None
    """Variables beside those of this process."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Options of `mgpu-launch serve`. No number of restarts is too much, and no drain is cut short."""
        patience = ("--hang-timeout", str(self.hang_timeout_s), "--max-restarts", "1000000", "--drain-timeout", "300")
        count = () if self.workers is None else ("--workers", str(self.workers))
        return ("-m", self.model, *count, *patience, "--kv-memory", self.kv_memory, *self.more)


class Server:
    """One server; a context manager that waits until it is ready unless told not to."""

    def __init__(self, server_options: ServerOptions, wait: bool = True) -> None:
        self.process = ServerProcess(*server_options.arguments, environ=server_options.environ)
        self.endpoint = ""
        self._wait = wait

    def __enter__(self) -> "Server":
        if self._wait:
            self.endpoint = self.process.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()

    @property
    def parent(self) -> psutil.Process:
        return psutil.Process(self.process.process.pid)

    def children(self, module: str = "mgpu.") -> list[psutil.Process]:
        """Find the processes of one module, or of a package; those of its children too."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            for child in self.parent.children(recursive=True):
                with suppress(psutil.Error):
                    if any(part.startswith(module) for part in child.cmdline()):
                        found.append(child)
        return found

    def workers(self) -> list[psutil.Process]:
        return self.children("mgpu.worker")

    def gateway(self) -> psutil.Process:
        return next(child for child in self.children("mgpu.orchestrator.gateway") if child.ppid() == self.parent.pid)

    def everyone(self) -> dict[str, psutil.Process]:
        """Return every process of the server under a name that stays the same."""
        named = {"parent": self.parent, "gateway": self.gateway()}
        workers = sorted(self.workers(), key=lambda worker: worker.pid)
        named |= {f"worker {rank}": worker for rank, worker in enumerate(workers)}
        known = {process.pid for process in named.values()}
        others = [child for child in self.children("") if child.pid not in known]
        return named | {f"helper {number}": child for number, child in enumerate(others)}

    def wait_for_restarts(self, count: int, client: Client) -> float:
        """Wait until the workers have been replaced ``count`` times and are ready; return the last recovery's time."""

        def recovered() -> Health | None:
            health = client.health()
            return health if health.restarts >= count and health.state == "ready" else None

        if (health := wait_until(recovered, STANDSTILL_S)) is None:
            raise Standstill(f"no recovery:\n{self.process.output()}")
        return health.last_recovery_s

    def sockets(self) -> int:
        """Count the unix sockets under the server's own folder."""
        return Path("/proc/net/unix").read_text().count(str(self.process.runtime_base))


def shared_memory() -> tuple[str, ...]:
    """Name everything in /dev/shm. What mgpu itself maps has no name."""
    return tuple(sorted(os.listdir("/dev/shm")))


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
