"""The server under attack: on ipc or on tcp with keys, kept to cores of its own, and what can be seen of it."""

import os
import resource
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from bench.attack import small_model
from bench.attack.situations import ORDINARY, Situation, make_model
from bench.attack.speakers import TIMEOUT_S, FrontSpeaker, HttpSpeaker, Speaker
from bench.chaos.load import Job, make_jobs
from bench.waiting import wait_until
from mgpu.launch.commands.install.keygen import make_client, make_server
from mgpu.launch.server_process import ServerProcess

Transport = Literal["ipc", "tcp"]
HONEST, HOSTILE = "honest", "hostile"
BACK_S = 20.0
"""How long memory and descriptors may take to come back after an attack."""
ANSWER_S = 90.0
"""How long the engine may take to answer: the steps of an attack may be long, and the machine busy."""


@dataclass(frozen=True)
class Footprint:
    """What a server holds: its parent, its gateway and its HTTP process together."""

    rss_bytes: int
    descriptors: int
    log_bytes: int
    gateway_pid: int


class Victim:
    """One server; a context manager that waits until it is ready."""

    def __init__(
        self, model: str, transport: Transport, cores: set[int], hostile_keys: int = 1, situation: Situation = ORDINARY
    ) -> None:
        """``hostile_keys``: how many keys attackers have, on tcp. They are named hostile0, hostile1, …"""
        self._folder = tempfile.TemporaryDirectory(prefix="mgpu-attack-")
        self._transport = transport
        self._cores = cores
        self._model = model
        self._situation = situation
        self._clients = [HONEST, *(f"{HOSTILE}{number}" for number in range(hostile_keys))]
        self.endpoint = ""
        self._api_keys: dict[str, str] = {}

    def __enter__(self) -> "Victim":
        options = [
            *self._model_options(Path(self._folder.name) / "model"),
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--max-seq-len",
            "512",
            "--kv-memory",
            "128MiB",
        ]
        if self._transport == "tcp":
            options += ["--bind", "tcp://127.0.0.1:0", "--keys", str(self._make_keys())]
        if self._situation.http:
            options += ["--http", "127.0.0.1:0", "--http-keys", str(self._make_api_keys())]
        self.log = Path(self._folder.name) / "log"
        self.server = ServerProcess(*options, log=self.log)
        os.sched_setaffinity(self.server.process.pid, self._cores)
        if most := self._situation.open_files:
            resource.prlimit(self.server.process.pid, resource.RLIMIT_NOFILE, (most, most))
        self.endpoint = self.server.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self._folder.cleanup()

    def _model_options(self, folder: Path) -> list[str]:
        if self._situation.split:
            return ["-m", str(make_model(folder, self._situation)), "--load-format", "dummy"]
        if self._model == small_model.NAME:
            return ["-m", str(small_model.write_small_model(folder)), "--load-format", "dummy"]
        return ["-m", self._model]

    def _make_keys(self) -> Path:
        keys = Path(self._folder.name) / "keys"
        make_server(keys)
        for client in self._clients:
            make_client(keys, client)
        return keys

    def _make_api_keys(self) -> Path:
        self._api_keys = {client: f"sk-{secrets.token_hex(16)}" for client in self._clients}
        file = Path(self._folder.name) / "api-keys"
        file.touch(mode=0o600)
        file.write_text("".join(f"{name} {key}\n" for name, key in self._api_keys.items()))
        for name, key in self._api_keys.items():
            (Path(self._folder.name) / f"{name}.api").write_text(key)
        return file

    def key_file(self, name: str) -> Path | None:
        """Return the file of a client's key for the front channel; None on ipc."""
        if self._transport == "ipc":
            return None
        return next(Path(self._folder.name).rglob(f"{name}.client"))

    def target(self, name: str) -> tuple[str, Path | None]:
        """Return what an attacker of that name attacks, and the file of its key: the front channel, or HTTP."""
        if self._situation.http:
            address = urlsplit(self.server.http_url()).netloc
            return f"tcp://{address}", Path(self._folder.name) / f"{name}.api"
        return self.endpoint, self.key_file(name)

    def client(self) -> FrontSpeaker:
        return FrontSpeaker(self.endpoint, keys=self.key_file(HONEST), silence_timeout_s=TIMEOUT_S)

    def speakers(self) -> list[Callable[[], Speaker]]:
        """Return how honest clients speak to this server: on the front channel, and where it has HTTP there too."""
        http = [lambda: HttpSpeaker(self.server.http_url(), self._api_keys[HONEST])] if self._situation.http else []
        return [self.client, *http]

    @property
    def lives(self) -> bool:
        return self.server.process.poll() is None

    @property
    def gateway(self) -> psutil.Process:
        return self._child("mgpu.orchestrator.gateway")

    def _child(self, module: str) -> psutil.Process:
        parent = psutil.Process(self.server.process.pid)
        return next(child for child in parent.children() if module in child.cmdline())

    def footprint(self) -> Footprint:
        processes = [psutil.Process(self.server.process.pid), self.gateway]
        if self._situation.http:
            processes.append(self._child("mgpu.orchestrator.http"))
        return Footprint(
            sum(process.memory_info().rss for process in processes),
            sum(process.num_fds() for process in processes),
            self.log.stat().st_size,
            processes[1].pid,
        )

    def wait_quiet(self, most: int) -> None:
        """Wait until no more than ``most`` requests are in flight: those of an earlier attack have ended."""
        with self.client() as client:
            wait_until(lambda: client.health().in_flight <= most, BACK_S)

    def restarts(self) -> tuple[int, int]:
        """Return how many gateways were replaced, and how many restarts of anything count to `--max-restarts`."""
        with self.client() as client:
            counters = wait_until(client.stats, ANSWER_S) or client.stats()
        return int(counters["gateway_restarts"]), int(counters["restarts"] + counters["gateway_restarts_counted"])

    def settled(self, before: Footprint, growth_bytes: int, growth_descriptors: int) -> Footprint:
        """Return what the server holds once that is little more than before, or after `BACK_S`."""
        deadline_s = time.monotonic() + BACK_S
        while True:
            with suppress(psutil.Error, StopIteration):
                found = self.footprint()
                is_back = found.descriptors <= before.descriptors + growth_descriptors
                if (is_back and found.rss_bytes <= before.rss_bytes + growth_bytes) or time.monotonic() > deadline_s:
                    return found
            if not self.lives:
                return before
            time.sleep(0.2)


def undisturbed(connect: Callable[[], Speaker], count: int) -> dict[Job, object]:
    """Return ``count`` requests with the answer that each gets when nothing else goes on."""
    with connect() as speaker:
        return {job: speaker.answer(job, lambda _count: None) for job in make_jobs(count, 24)}
