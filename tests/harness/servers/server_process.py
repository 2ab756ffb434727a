"""Run a whole server in its own process with fake workers and a fake gateway, and speak to it as its gateway."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import zmq

from harness.models.parts import with_changes
from harness.specs import make_facts
from harness.waiting import eventually
from mgpu.orchestrator.config import ServerConfig, Timeouts
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.reload import Reloadable
from mgpu.orchestrator.host.signals import end_process
from mgpu.orchestrator.host.systemd import Notifier
from mgpu.orchestrator.server import Server
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import (
    LINK,
    Cancel,
    EngineInfo,
    Outputs,
    RecordQuery,
    RecordReply,
    Reload,
    Resumable,
    StatsQuery,
    StatsReply,
    Submit,
    WakeUp,
)
from mgpu.protocol.internal.worker_messages import RowSampling
from mgpu.protocol.model.facts import ModelSource
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import PlacementPlan, Stage

DEADLINE_S = 60.0


FACTS = make_facts(
    q=4, kv=4, layers=4, hidden=64, width=128, head_dim=16, vocab=1000, context=256, tied=True, bos_token_id=None,
    checkpoint_dtype="float32",
)  # fmt: skip


def plan_of(num_stages: int, ranks_per_stage: int) -> PlacementPlan:
    layers = FACTS.num_layers // num_stages
    return PlacementPlan(
        tuple(Stage(i * layers, (i + 1) * layers, tuple(range(ranks_per_stage))) for i in range(num_stages))
    )


def config(num_stages: int = 1, ranks_per_stage: int = 1, **changes: Any) -> ServerConfig:
    plain = ServerConfig(
        model=ModelSource("/nowhere", "safetensors"),
        facts=FACTS,
        model_name="fake",
        layout=Layout(plan_of(num_stages, ranks_per_stage), "float32", "shared-memory", "shared-memory"),
        layout_table="layout of the test",
        limits=StepLimits(block_size=4, max_rows=16, max_batch_tokens=64, max_seq_len=FACTS.max_position),
        device_kind="cpu",
        memory_fraction=0.9,
        kv_memory=0,
        prefix_cache=True,
        seed=0,
        timeouts=Timeouts(stop_timeout_s=3.0),
        worker_command=(sys.executable, "-m", "harness.servers.fake_worker"),
        gateway_command=(sys.executable, "-m", "harness.servers.fake_gateway"),
    )
    return with_changes(plain, **changes)


class ServerProcess:
    """A running server, its log, and the gateway's socket. ``finish`` collects one ending per request."""

    def __init__(self, socket: "zmq.Socket[bytes]", process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.socket = socket
        self.process = process
        self.log_path = log
        self.infos: list[EngineInfo] = []
        self.stats: list[StatsReply] = []
        self.records: list[RecordReply] = []
        self.reloads: list[Reload] = []
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, str] = {}
        self.errors: dict[int, str] = {}

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def submit(self, sequence_id: int, prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()) -> None:
        ids = array("i", prompt).tobytes()
        self.send(Submit(sequence_id, ids, max_tokens, list(stop_ids), RowSampling(), b"", 0))

    def begin(self, sequence_id: int, prompt: list[int], max_tokens: int) -> None:
        """Submit a request, and wait for its first token."""
        self.submit(sequence_id, prompt, max_tokens)
        self.wait_for(lambda: sequence_id in self.tokens)

    def serve(self, sequence_id: int, prompt: list[int], max_tokens: int) -> None:
        """Submit a request, and wait for its end."""
        self.submit(sequence_id, prompt, max_tokens)
        self.wait_for(lambda: sequence_id in self.finish)

    def send(self, message: Submit | Resumable | RecordQuery | Cancel | WakeUp | StatsQuery) -> None:
        self.socket.send(LINK.encode(message))

    def wait_for(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self.socket.poll(int(left_s * 1000)):
                raise AssertionError(f"waited in vain; the server's log:\n{self.log}")
            self._take(LINK.decode(self.socket.recv()))

    def wait_for_log(self, text: str) -> None:
        """Wait until the server has logged it, and still answers."""
        eventually(lambda: text in self.log or not self.counters(), lambda: f"{text!r} is not in the log:\n{self.log}")

    def wait_ready(self) -> None:
        self.wait_for(lambda: any(info.state == "ready" for info in self.infos))

    def wait_exit(self) -> int:
        status = self.process.wait(DEADLINE_S)
        while self.socket.poll(100):
            self._take(LINK.decode(self.socket.recv()))
        return status

    def end(self, signal_number: signal.Signals) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(signal_number)
        return self.wait_exit()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        """The worker processes by rank, as far as they run now."""
        found: list[tuple[int, psutil.Process]] = []
        for worker in self.children_like("harness.servers.fake_worker"):
            with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
                found.append((int(worker.environ()["RANK"]), worker))
        return [worker for _, worker in sorted(found, key=lambda pair: pair[0])]

    def children_like(self, word: str) -> list[psutil.Process]:
        """The children that live and have ``word`` in their command."""
        found: list[psutil.Process] = []
        for child in self.children():
            with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
                if word in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def counters(self) -> dict[str, float]:
        self.stats.clear()
        self.send(StatsQuery(1))
        self.wait_for(lambda: bool(self.stats))
        return self.stats[0].counters

    def _take(self, message: object) -> None:
        if isinstance(message, EngineInfo):
            self.infos.append(message)
        elif isinstance(message, StatsReply):
            self.stats.append(message)
        elif isinstance(message, RecordReply):
            self.records.append(message)
        elif isinstance(message, Reload):
            self.reloads.append(message)
        elif isinstance(message, Outputs):
            columns = (message.sequence_ids, message.token_ids, message.finish, message.errors)
            for sequence_id, tokens, finish, error in zip(*columns, strict=True):
                assert sequence_id not in self.finish, "an output after the ending"
                self.tokens.setdefault(sequence_id, []).extend(tokens)
                if finish:
                    self.finish[sequence_id] = finish
                    self.errors[sequence_id] = error


@contextlib.contextmanager
def running_server(
    folder: Path, options: dict[str, Any] | None = None, through: Sequence[str] = (), **changes: Any
) -> Iterator[ServerProcess]:
    """Start a server with ``config(**changes)`` and the fake workers' ``options``; kill what is left at the end.

    ``through`` is a command that executes the rest of its arguments.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.bind(f"ipc://{folder}/test")
    log = folder / "log"
    env = {
        **os.environ,
        "MGPU_RUNTIME_DIR": str(folder / "run"),
        "FAKE_GATEWAY": f"ipc://{folder}/test",
        "FAKE_WORKER": json.dumps(options or {}),
    }
    arguments = json.dumps(changes)
    with log.open("wb") as stream:
        command = [*through, sys.executable, "-m", "harness.servers.server_process", arguments]
        process = subprocess.Popen(command, env=env, stderr=stream)
    server = ServerProcess(socket, process, log)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(DEADLINE_S)
        context.destroy(linger=0)


@contextlib.contextmanager
def ready_server(folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> Iterator[ServerProcess]:
    """Start a server as ``running_server`` does, and wait until it is ready."""
    with running_server(folder, options, **changes) as server:
        server.wait_ready()
        yield server


def read_again() -> Reloadable:
    """Read the file ``reload`` beside the log: how many requests a client may have."""
    text = (Path(os.environ["MGPU_RUNTIME_DIR"]).parent / "reload").read_text()
    if not text.isdecimal():
        raise UserError(f"{text!r} is not a number")
    return Reloadable(None, ClientLimits(max_client_requests=int(text)), drain_timeout_s=0.0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    notifier = Notifier.from_environment(os.environ)
    try:
        end_process(Server(config(**json.loads(sys.argv[1])), notifier, read_again).run())
    except UserError as error:  # as the command does
        logging.error("%s", error)
        sys.exit(error.exit_code)
