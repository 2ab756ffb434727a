"""Break a real server under load, over and over, and count what its clients lose: `make chaos`.

Every stream is compared, token for token, with a run of the same request that nothing disturbed. A request that runs
in two worker crashes in a row is given up by design, so the next crash waits until the streams of the last have ended.

    python bench/chaos.py [--model demo] [--workers 3] [--streams 16] [--kills 8] [--stops 1] [--gateway-kills 5]
                          [--parent-kills 1] [--sigterms 1] [--gone-clients 40] [--json FILE]
"""

import argparse
import itertools
import json
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import machine
import msgpack
import psutil
import zmq
from chaos_load import STANDSTILL_S, Standstill, Streams, Tally, make_jobs, undisturbed

from mgpu import Client
from mgpu.launch.server_process import ServerProcess
from mgpu.protocol.completion import MgpuError

LEFT_S = 2.0
HANG_S = 5.0
MOMENTS = ("decode", "prefill", "idle", "load")


@dataclass
class Row:
    """One line of the table."""

    fault: str
    injections: int = 0
    finished: int = 0
    tokens: int = 0
    lost: int = 0
    repeated: int = 0
    different: int = 0
    seconds: list[float] = field(default_factory=list)
    """Per injection: until everything was well again."""
    problems: list[str] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        for name in ("finished", "tokens", "lost", "repeated", "different"):
            setattr(self, name, getattr(self, name) + getattr(tally, name))
        self.problems += tally.problems

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.repeated or self.different or self.problems)


class Server:
    """A server whose processes can be found and hurt."""

    def __init__(self, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self.process = ServerProcess(
            *arguments, "--max-seq-len", "512", "--max-restarts", "1000000", "--hang-timeout", str(HANG_S),
            environ=environ,
        )  # fmt: skip

    def __enter__(self) -> "Server":
        self.endpoint = self.process.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()

    @classmethod
    def on_cpu(cls, options: argparse.Namespace) -> "Server":
        return cls("-m", options.model, "--device", "cpu", "--workers", str(options.workers))

    def children(self, module: str = "mgpu.") -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for child in psutil.Process(self.process.process.pid).children():
            with suppress(psutil.Error):
                if any(part.startswith(module) for part in child.cmdline()):
                    found.append(child)
        return found

    def workers(self) -> list[psutil.Process]:
        return self.children("mgpu.worker")

    def gateway(self) -> psutil.Process:
        return self.children("mgpu.orchestrator.gateway")[0]

    def wait_for_restarts(self, count: int, client: Client) -> float:
        """Wait until the workers were replaced so often and are ready; gives what the last time took."""
        deadline_s = time.monotonic() + STANDSTILL_S
        while time.monotonic() < deadline_s:
            with suppress(MgpuError):
                health = client.health()
                if health.restarts >= count and health.state == "ready":
                    return health.last_recovery_s
            time.sleep(0.02)
        raise Standstill(f"no recovery:\n{self.process.output()}")


def kill_workers(server: Server, streams: Streams, count: int, moments: Sequence[str] = MOMENTS) -> Row:
    """SIGKILL one rank after another, in turn while idle, in a prompt, while decoding and while loading."""
    row = Row("SIGKILL of a worker: " + ", ".join(moments))
    with Client(server.endpoint, silence_timeout_s=60) as client:
        for moment, rank in zip(itertools.islice(itertools.cycle(moments), count), itertools.count()):
            restarts = client.health().restarts
            if moment == "idle":
                streams.pause()
                wait_until(lambda: client.health().in_flight == 0, STANDSTILL_S)
            elif moment == "prefill":
                streams.wait_for_all()
            else:
                streams.wait_for_pieces(40)
            workers = server.workers()
            workers[rank % len(workers)].kill()
            row.injections += 1
            if moment == "load":
                known = {worker.pid for worker in workers}
                wait_until(lambda known=known: bool({w.pid for w in server.workers()} - known), 30)  # type: ignore[misc]
                time.sleep(0.5)  # inside the import of torch, or the rendezvous
                new = [worker for worker in server.workers() if worker.pid not in known]
                new[rank % len(new)].kill()
                row.injections += 1
            row.seconds.append(server.wait_for_restarts(restarts + 1 + (moment == "load"), client))
            streams.go_on()
            streams.wait_for_all()
    return row


def stop_workers(server: Server, streams: Streams, count: int) -> Row:
    """SIGSTOP a rank: the others wait for it, and only the hang deadline can tell."""
    row = Row("SIGSTOP of a worker")
    with Client(server.endpoint, silence_timeout_s=60) as client:
        for rank in range(count):
            restarts = client.health().restarts
            streams.wait_for_pieces(40)
            workers = server.workers()
            began_s = time.monotonic()
            workers[rank % len(workers)].send_signal(signal.SIGSTOP)
            server.wait_for_restarts(restarts + 1, client)
            row.seconds.append(time.monotonic() - began_s)
            row.injections += 1
            streams.wait_for_all()
    return row


def kill_gateways(server: Server, streams: Streams, count: int) -> Row:
    """SIGKILL the gateway while every stream is somewhere in its answer."""
    row = Row("SIGKILL of the gateway")
    for number in range(count):
        streams.wait_for_pieces(20 + 13 * number % 50)
        began_s = time.monotonic()
        server.gateway().kill()
        wait_until(lambda number=number: gateway_restarts(server) > number, 60)  # type: ignore[misc]
        row.seconds.append(time.monotonic() - began_s)
        row.injections += 1
    return row


def gateway_restarts(server: Server) -> float:
    with Client(server.endpoint) as client:
        return client.stats()["gateway_restarts"]


def kill_parents(make_server: Callable[[], Server], count: int) -> Row:
    """SIGKILL the parent: after two seconds nothing of the server may be left."""
    row = Row("SIGKILL of the parent")
    for _ in range(count):
        with make_server() as server, Client(server.endpoint) as client:
            family = server.children()
            streams = [client.stream([number + 3], max_tokens=400) for number in range(16)]
            next(streams[0])
            began_s = time.monotonic()
            server.process.process.kill()
            server.process.process.wait()
            base = server.process.runtime_base
            if not wait_until(lambda family=family: not any(map(is_alive, family)), LEFT_S):  # type: ignore[misc]
                row.problems.append("processes were left")
            if not wait_until(lambda base=base: [p.name for p in base.iterdir()] == ["log"], LEFT_S):  # type: ignore[misc]
                row.problems.append("files were left")
            row.seconds.append(time.monotonic() - began_s)
            row.injections += 1
    return row


def terminate(options: argparse.Namespace, count: int) -> Row:
    """SIGTERM with 64 streams: all of them finish, and the exit status is the signal's."""
    row = Row("SIGTERM with 64 streams")
    for _ in range(count):
        with Server.on_cpu(options) as server, Client(server.endpoint) as client:
            streams = [client.stream([number + 3], max_tokens=30, ignore_eos=True) for number in range(64)]
            next(streams[63])
            began_s = time.monotonic()
            server.process.process.send_signal(signal.SIGTERM)
            for stream in streams:
                done = stream.completion()
                row.finished += 1
                row.tokens += len(done.token_ids)
                row.lost += 30 - len(done.token_ids)
            status = server.process.process.wait(STANDSTILL_S)
            if status not in (0, -signal.SIGTERM):
                row.problems.append(f"exit status {status}")
            row.seconds.append(time.monotonic() - began_s)
            row.injections += 1
    return row


def leave(server: Server, count: int) -> Row:
    """Vanish without a word, in the prompt or in the answer: the blocks must come back."""
    row = Row("client gone mid-prefill, mid-decode")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for number in range(count):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(server.endpoint)
        request = {"type": "generate", "id": 1, "prompt_ids": list(range(3, 300)), "max_tokens": 200, "stream": True}
        socket.send_multipart([b"mgpu1", msgpack.packb(request)])
        for _ in range(1 if number % 2 else 3):  # accepted, or the first tokens
            socket.poll(30_000)
            socket.recv_multipart()
        socket.close()
        row.injections += 1
    began_s = time.monotonic()
    with Client(server.endpoint) as client:
        if not wait_until(lambda: client.stats()["kv_blocks_used"] == 0, 10):
            row.problems.append(f"blocks are still held: {client.stats()}")
    row.seconds.append(time.monotonic() - began_s)
    context.term()
    return row


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with suppress(MgpuError):
            if condition():
                return True
        time.sleep(0.01)
    return False


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Run everything that was asked for, one fault after another."""
    jobs = make_jobs(options.streams + 8, options.answer_tokens)
    with Server.on_cpu(options) as server:
        expected = undisturbed(server.endpoint, jobs)
        faults: tuple[tuple[int, Callable[[Server, Streams, int], Row]], ...] = (
            (options.kills, kill_workers),
            (options.stops, stop_workers),
            (options.gateway_kills, kill_gateways),
        )
        for count, fault in faults:
            if count:
                with Streams(server.endpoint, expected, options.streams) as streams:
                    row = fault(server, streams, count)
                row.add(streams.tally)
                yield row
        if options.gone_clients:
            yield leave(server, options.gone_clients)
    if options.parent_kills:
        yield kill_parents(lambda: Server.on_cpu(options), options.parent_kills)
    if options.sigterms:
        yield terminate(options, options.sigterms)


def table_line(row: Row) -> str:
    seconds = sorted(row.seconds)
    times = f"{statistics.median(seconds):.2f} / {seconds[-1]:.2f}" if seconds else "-"
    numbers = f"{row.injections} | {row.finished} | {row.tokens} | {row.lost} | {row.repeated} | {row.different}"
    return f"| {row.fault} | {numbers} | {times} | {'yes' if row.is_good else 'NO'} |"


HEADING = """| fault | injections | streams finished | tokens | lost | repeated | different | s, median / worst | good |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--answer-tokens", type=int, default=40)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--stops", type=int, default=1)
    parser.add_argument("--gateway-kills", type=int, default=5)
    parser.add_argument("--parent-kills", type=int, default=1)
    parser.add_argument("--sigterms", type=int, default=1)
    parser.add_argument("--gone-clients", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = machine.describe()
    print(machine.heading(facts), flush=True)
    print(HEADING, flush=True)
    results = []
    for row in rows(options):
        print(table_line(row), flush=True)
        for problem in row.problems[:10]:
            print(f"    {problem}", flush=True)
        results.append(row)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": facts, "rows": [asdict(row) for row in results]}, indent=1))
    assert threading.active_count() == 1, "a stream did not end"
    if not all(row.is_good for row in results):
        raise SystemExit("something was lost, repeated, changed or left behind")


if __name__ == "__main__":
    main()
