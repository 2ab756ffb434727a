"""A server whose workers join over tcp, as processes of this machine that stand for hosts."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.waiting import eventually
from mgpu.launch.commands.install.keygen import make_server, make_worker
from mgpu.launch.server_process import ServerProcess

FAKE = "harness.ranks.fake_host"
"""As `mgpu.worker --join`, with workers that need no torch."""
END_S = 60.0


def make_keys(folder: Path) -> Path:
    """Make a server's keys with one host's among them; return the folder."""
    make_server(folder)
    make_worker(folder, "host")
    return folder


def environment_of(rank: int, world_size: int, **changes: str) -> dict[str, str]:
    """Return what a launcher says to a rank, one on each host. An empty value removes a name."""
    names = {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "GROUP_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
    } | changes  # fmt: skip
    return {name: value for name, value in {**os.environ, **names}.items() if value}


def srun_environment(rank: int, world_size: int) -> dict[str, str]:
    """Return what srun says to a rank, one on each host, as changes of `environment_of`."""
    names = {"PROCID": rank, "LOCALID": 0, "NTASKS": world_size, "NODEID": rank}
    of_srun = {f"SLURM_{name}": str(value) for name, value in names.items()}
    of_srun["SLURM_STEP_TASKS_PER_NODE"] = f"1(x{world_size})"
    return {"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": "", "GROUP_RANK": "", **of_srun}


def pod_environment(world_size: int) -> dict[str, str]:
    """Return what a manifest says to a pod of a StatefulSet, as changes of `environment_of`."""
    names = {"WORLD_SIZE": str(world_size), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    return {"RANK": "", "LOCAL_RANK": "", "GROUP_RANK": "", **names}


def as_host(name: str) -> list[str]:
    """Return what goes before a command so that its host has this name. It needs root."""
    return ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]


class Host:
    """A process that joins, with its log."""

    def __init__(self, log: Path, command: list[str], environ: Mapping[str, str]) -> None:
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stderr=stream)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def status(self) -> int:
        """Return the exit status, once it ends by itself."""
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs:\n{self.log()}") from None


class JoinedServer:
    """A server that waits for hosts, and the hosts that were started for it."""

    def __init__(self, folder: Path, model: Path, server: ServerProcess, module: str) -> None:
        self.folder = folder
        self.server = server
        self.hosts: list[Host] = []
        self._model = model
        self._module = module

    @property
    def endpoint(self) -> str:
        """Where hosts join, as the log says."""
        return str(eventually(lambda: re.search(r"at (tcp://\S+)", self.server.output()), self.server.output)[1])  # type: ignore[index]

    def start(self, rank: int, world_size: int, *options: str, before: Sequence[str] = (), **changes: str) -> Host:
        """Start the process of a rank. ``changes`` are of its environment; ``options`` go before the usual ones.

        ``before`` goes before the command.
        """
        usual = ["--keys", str(self.folder / "keys" / "host.worker"), "-m", str(self._model), "--device", "cpu"]
        command = [*before, sys.executable, "-m", self._module, "--join", self.endpoint, *usual, *options]
        host = Host(self.folder / f"host-{len(self.hosts)}", command, environment_of(rank, world_size, **changes))
        self.hosts.append(host)
        return host


@contextlib.contextmanager
def joined_server(
    folder: Path, model: Path, *options: str, nodes: int = 2, module: str = FAKE
) -> Iterator[JoinedServer]:
    """Start a server that waits for ``nodes`` hosts; kill what is left at the end."""
    keys = make_keys(folder / "keys")
    arguments = ["-m", str(model), "--nodes", str(nodes), "--join", "tcp://127.0.0.1:0", "--keys", str(keys), *options]
    with ServerProcess(*arguments, log=folder / "head") as server:
        joined = JoinedServer(folder, model, server, module)
        try:
            yield joined
        finally:
            for host in joined.hosts:
                host.process.kill()
                host.process.wait()
