"""The server under attack: on ipc or on tcp with keys, kept to cores of its own, and what can be seen of it."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from mgpu import Client
from mgpu.launch.server_process import ServerProcess

Transport = Literal["ipc", "tcp"]
HONEST, HOSTILE = "honest", "hostile"
BACK_S = 20.0
"""How long memory and descriptors may take to come back after an attack."""


@dataclass(frozen=True)
class Footprint:
    """What a server holds: its parent and its gateway together."""

    rss_bytes: int
    descriptors: int
    log_bytes: int
    gateway_pid: int


class Victim:
    """One server; a context manager that waits until it is ready."""

    def __init__(self, model: str, transport: Transport, cores: set[int]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mgpu-attack-")
        self._transport = transport
        self._cores = cores
        self._model = model
        self.endpoint = ""

    def __enter__(self) -> "Victim":
        options = ["-m", self._model, "--device", "cpu", "--max-seq-len", "512", "--kv-memory", "128MiB"]
        if self._transport == "tcp":
            options += ["--bind", "tcp://127.0.0.1:0", "--keys", str(self._make_keys())]
        self.log = Path(self._folder.name) / "log"
        self.server = ServerProcess(*options, log=self.log)
        os.sched_setaffinity(self.server.process.pid, self._cores)
        self.endpoint = self.server.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self._folder.cleanup()

    def _make_keys(self) -> Path:
        keys = Path(self._folder.name) / "keys"
        keygen = [sys.executable, "-m", "mgpu.launch.cli", "keygen", "--out", str(keys)]
        for client in ([], ["--client", HONEST], ["--client", HOSTILE]):
            subprocess.run([*keygen, *client], check=True, stdout=subprocess.DEVNULL)
        return keys

    def key_file(self, name: str) -> Path | None:
        if self._transport == "ipc":
            return None
        return next(Path(self._folder.name).rglob(f"{name}.client"))

    def client(self) -> Client:
        return Client(self.endpoint, keys=self.key_file(HONEST), silence_timeout_s=60.0)

    @property
    def lives(self) -> bool:
        return self.server.process.poll() is None

    @property
    def gateway(self) -> psutil.Process:
        parent = psutil.Process(self.server.process.pid)
        return next(child for child in parent.children() if "mgpu.orchestrator.gateway" in child.cmdline())

    def footprint(self) -> Footprint:
        processes = [psutil.Process(self.server.process.pid), self.gateway]
        return Footprint(
            sum(process.memory_info().rss for process in processes),
            sum(process.num_fds() for process in processes),
            self.log.stat().st_size,
            processes[1].pid,
        )

    def settled(self, before: Footprint, growth_bytes: int) -> Footprint:
        """Return what the server holds once that is little more than before, or after `BACK_S`."""
        deadline_s = time.monotonic() + BACK_S
        while True:
            with suppress(psutil.Error, StopIteration):
                found = self.footprint()
                is_back = found.descriptors <= before.descriptors
                if (is_back and found.rss_bytes <= before.rss_bytes + growth_bytes) or time.monotonic() > deadline_s:
                    return found
            if not self.lives:
                return before
            time.sleep(0.2)
