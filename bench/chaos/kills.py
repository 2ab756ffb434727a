"""Faults that a server survives: workers and the gateway are killed or stopped under streams.

A request that runs in two worker crashes in a row is given up by design, so the next crash waits until the streams of
the last have ended.
"""

import random
import re
import signal
import time

import psutil

from bench.chaos.load import STANDSTILL_S, Streams
from bench.chaos.server import Server
from bench.chaos.table import Row
from bench.waiting import wait_until
from mgpu import Client

SILENCE_S = 120.0
NOTICED_S = 5.0
"""How much later than the hang deadline a stopped worker may be noticed, and a recovery be told, on a busy machine."""
HUNG = re.compile(r"no result of a step of \d+ tokens for ([0-9.]+) s, longer than ([0-9.]+) s")


def kill_idle_workers(server: Server, streams: Streams, count: int) -> Row:
    """SIGKILL one rank after another while there is nothing to do; the streams begin while it recovers."""
    row = Row("SIGKILL of a worker, idle")
    with Client(server.endpoint, silence_timeout_s=SILENCE_S) as client:
        for rank in range(count):
            streams.pause()
            if not wait_until(lambda: client.health().in_flight == 0, STANDSTILL_S):
                row.problems.append("the streams did not end")
            _kill(server, rank, client, row, streams)
    return row


def kill_workers_in_prompts(server: Server, streams: Streams, count: int) -> Row:
    """SIGKILL a rank while the prompts of all streams are computed: all begin at once, and none has a token yet."""
    row = Row("SIGKILL of a worker, prefill")
    without = 0
    with Client(server.endpoint, silence_timeout_s=SILENCE_S) as client:
        for rank in range(count):
            streams.pause()
            wait_until(lambda: client.health().in_flight == 0, STANDSTILL_S)
            before = streams.pieces
            streams.go_on()
            wait_until(lambda: client.stats()["steps_in_flight"] > 0, STANDSTILL_S)
            without += streams.pieces == before
            _kill(server, rank, client, row, streams)
    row.notes.append(f"{without} of {count} were killed before any stream had its first token")
    return row


def kill_decoding_workers(server: Server, streams: Streams, count: int) -> Row:
    """SIGKILL a rank while the streams are somewhere in their answers."""
    row = Row("SIGKILL of a worker, decode")
    rng = random.Random(8)
    with Client(server.endpoint, silence_timeout_s=SILENCE_S) as client:
        for rank in range(count):
            streams.wait_for_pieces(rng.randrange(20, 200))
            _kill(server, rank, client, row, streams)
    return row


def kill_loading_workers(server: Server, streams: Streams, count: int) -> Row:
    """SIGKILL a rank, and then another one of those that load in its place. Both count."""
    row = Row("SIGKILL of a worker, decode, and one more, load")
    rng = random.Random(9)
    with Client(server.endpoint, silence_timeout_s=SILENCE_S) as client:
        for rank in range((count + 1) // 2):
            restarts = client.health().restarts
            streams.wait_for_pieces(40)
            workers = server.workers()
            workers[rank % len(workers)].kill()
            new = _replacements(server, {worker.pid for worker in workers})
            time.sleep(rng.uniform(0, 2.5))  # inside the import of torch, the rendezvous or the reading of weights
            new[rng.randrange(len(new))].kill()
            row.injected(server.wait_for_restarts(restarts + 2, client), count=2)
            streams.wait_for_all()
    return row


def _replacements(server: Server, known: set[int]) -> list[psutil.Process]:
    """Wait until as many others than the ``known`` workers run, and return them."""

    def new() -> list[psutil.Process]:
        return [worker for worker in server.workers() if worker.pid not in known]

    wait_until(lambda: len(new()) == len(known), 30)
    return new()


def _kill(server: Server, rank: int, client: Client, row: Row, streams: Streams) -> None:
    restarts = client.health().restarts
    workers = server.workers()
    workers[rank % len(workers)].kill()
    streams.go_on()
    row.injected(server.wait_for_restarts(restarts + 1, client))
    streams.wait_for_all()


def stop_workers(server: Server, streams: Streams, count: int, hang_timeout_s: float) -> Row:
    """SIGSTOP a rank: the others wait for it, and only the hang deadline can tell.

    The deadline is ``hang_timeout_s``, or 20 times what such a step usually takes; the server logs which it was.
    """
    row = Row(f"SIGSTOP of a worker, --hang-timeout {hang_timeout_s:g}")
    deadlines_s: list[float] = []
    with Client(server.endpoint, silence_timeout_s=SILENCE_S) as client:
        for rank in range(count):
            restarts = client.health().restarts
            streams.wait_for_pieces(100)
            workers = server.workers()
            began_s = time.monotonic()
            workers[rank % len(workers)].send_signal(signal.SIGSTOP)
            recovery_s = server.wait_for_restarts(restarts + 1, client)
            took_s = time.monotonic() - began_s
            waited_s, deadline_s = map(float, HUNG.findall(server.process.output())[-1])
            deadlines_s.append(deadline_s)
            if max(waited_s - deadline_s, took_s - recovery_s - waited_s) > NOTICED_S:
                row.problems.append(
                    f"{took_s:.1f} s for a deadline of {deadline_s} s and a recovery of {recovery_s:.1f} s"
                )
            row.injected(took_s)
            streams.wait_for_all()
    row.notes.append(f"the deadlines were {min(deadlines_s):g} to {max(deadlines_s):g} s")
    return row


def kill_gateways(server: Server, streams: Streams, count: int) -> Row:
    """SIGKILL the gateway while every stream is somewhere in its answer."""
    row = Row("SIGKILL of the gateway")
    for number in range(count):
        streams.wait_for_pieces(20 + 13 * number % 50)
        began_s = time.monotonic()
        server.gateway().kill()
        if not wait_until(lambda number=number: _gateway_restarts(server) > number, 60):  # type: ignore[misc]
            row.problems.append("the gateway did not come back")
        row.injected(time.monotonic() - began_s)
    return row


def _gateway_restarts(server: Server) -> float:
    with Client(server.endpoint) as client:
        return client.stats()["gateway_restarts"]
