"""A server on namespaces of this machine: the head on the first, and a real torchrun on each of them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil

from bench.hosts.network import Loopback, Network
from bench.waiting import wait_until
from mgpu.launch.commands.install.keygen import make_server, make_worker
from mgpu.protocol.discovery import BASE_VARIABLE, running_servers

Rendezvous = Literal["static", "c10d"]
"""How launchers find each other: by numbers and an address that each is told, or by torchrun's own store."""
_END_S = 60.0


class Cluster:
    """A head and its hosts. `start` begins all of them; leaving the context ends what is left."""

    def __init__(
        self, network: Network | Loopback, hosts: int, model: str, *options: str, rendezvous: Rendezvous = "static"
    ) -> None:
        """``options`` are those of `serve`; ``rendezvous`` is how the launchers find each other."""
        self._rendezvous = rendezvous
        self.network = network
        self.hosts = hosts
        self.endpoint = ""
        """Of the server, once it is ready."""
        self._join_port, self._master_port = _free_ports(2)
        self._model = model
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="mgpu-hosts-")
        self.folder = Path(self._folder.name)
        self.environ = {**os.environ, BASE_VARIABLE: str(self.folder / "run")}
        (self.folder / "run").mkdir()
        make_server(self.folder / "keys")
        make_worker(self.folder / "keys", "host")
        self.head: subprocess.Popen[bytes] | None = None
        self.launchers: list[subprocess.Popen[bytes]] = []

    @property
    def join(self) -> str:
        return f"tcp://{self.network.address(0)}:{self._join_port}"

    def start(self, timeout_s: float = 300.0) -> None:
        """Start everything, and return once the server is ready."""
        words = ["-m", self._model, "--nodes", str(self.hosts), "--join", self.join]
        words += ["--keys", str(self.folder / "keys"), "--http", "none", *self._options]
        self.head = self._run(0, "head", ["-m", "mgpu.launch.cli", "serve", *words])
        for at in range(self.hosts):
            self.launch(at)
        servers = wait_until(lambda: running_servers(self.environ) or self._has_ended(), timeout_s)
        if not servers or servers is True:
            raise RuntimeError(f"the server is not ready:\n{self.logs()}")
        self.endpoint = servers[0].endpoint

    def launch(self, at: int) -> None:
        """Start torchrun on a host."""
        run = ["--nnodes", str(self.hosts), "--nproc-per-node", "1", "--max-restarts", "9"]
        if self._rendezvous == "c10d":
            run += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.network.address(0)}:{self._master_port}"]
            run += ["--rdzv-id", "mgpu", "--local-addr", self.network.address(at)]  # no name service knows the hosts
            run += ["--rdzv-conf", f"is_host={int(at == 0)}"]
        else:
            run += ["--node-rank", str(at), "--master-addr", self.network.address(0)]
            run += ["--master-port", str(self._master_port)]
        worker = ["-m", "mgpu.worker", "--join", self.join, "--keys", str(self.folder / "keys" / "host.worker")]
        launcher = self._run(
            at, f"host-{at}", ["-m", "torch.distributed.run", *run, *worker, "-m", self._model, "--device", "cpu"]
        )
        self.launchers[at : at + 1] = [launcher]

    def processes(self, at: int, word: str) -> list[psutil.Process]:
        """Return the processes of a host whose command line ends in, or has, a word."""
        below = psutil.Process(self.launchers[at].pid).children(recursive=True)
        return [each for each in below if word in each.cmdline()]

    def kill_host(self, at: int) -> None:
        """Kill torchrun and all that it started, as the end of a host does."""
        launcher = psutil.Process(self.launchers[at].pid)
        for process in (launcher, *launcher.children(recursive=True)):
            process.kill()
        self.launchers[at].wait(_END_S)

    def stop(self) -> list[int]:
        """Stop the server; return the exit statuses of the launchers."""
        assert self.head is not None
        self.head.send_signal(signal.SIGTERM)
        self.head.wait(_END_S)
        return [launcher.wait(_END_S) for launcher in self.launchers]

    def log(self) -> str:
        """Return what the head has logged."""
        return (self.folder / "head").read_text(errors="replace")

    def logs(self) -> str:
        """Return the last lines of all logs."""
        names = ["head", *(f"host-{at}" for at in range(self.hosts))]
        files = [self.folder / name for name in names if (self.folder / name).exists()]
        return "\n".join(f"== {file.name}\n{_tail(file.read_text(errors='replace'))}" for file in files)

    def recoveries(self) -> list[float]:
        """Return how long each recovery has taken, in seconds."""
        return [float(each) for each in re.findall(r"recovered in ([\d.]+) s", self.log())]

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.head, *self.launchers):
            if process is not None and process.poll() is None:
                for each in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                    each.kill()
                process.wait(_END_S)
        self._folder.cleanup()

    def _run(self, at: int, log: str, words: Sequence[str]) -> "subprocess.Popen[bytes]":
        command = [*self.network.command(at), sys.executable, *words]
        with (self.folder / log).open("ab") as stream:
            return subprocess.Popen(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )  # the wrappers before the command replace themselves by it

    def _has_ended(self) -> bool:
        return self.head is not None and self.head.poll() is not None


def _free_ports(count: int) -> list[int]:
    """Return ports that are free on this host, and so in an empty namespace."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-25:])
