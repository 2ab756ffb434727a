"""What hostile connections cost and what faults lose over HTTP, in a short form."""

import argparse
import threading
from pathlib import Path

import pytest

from bench.http.chaos import HTTP, WORKER, kill
from bench.http.connections import Server, run
from harness.servers.gateway_process import GatewayProcess, make_model_folder
from harness.servers.http_process import HttpServer

TEXTS = {"a": "A", "b": "B"}


def test_each_kind_of_connection_is_measured_and_the_next_request_served(tmp_path: Path) -> None:
    few = argparse.Namespace(idle=5, many=20, slow=5, bodies=2, seconds=0.1, save=None)
    with GatewayProcess(make_model_folder(tmp_path)) as gateway, HttpServer(gateway.endpoint) as http:
        table = run(Server(http.url, http.process.pid), few)
        gateway.wait_until_idle()
    assert [row.count for row in table.rows] == [5, 20, 5, 5, 5, 2]
    assert all(row.served_ms < float("inf") for row in table.rows)


class Breaking:
    """Streams that go on or break off when a process is killed, as a test says."""

    def __init__(self, text: str, breaks_off: bool) -> None:
        self.text, self.breaks_off, self.killed = text, breaks_off, threading.Event()

    def answer(self, prompt: str, begun: object = None) -> str:
        if callable(begun):
            begun()
            assert self.killed.wait(20)
            if self.breaks_off:
                raise ConnectionError
        return self.text or prompt.upper()

    def kill(self, module: str) -> None:
        self.killed.set()


@pytest.mark.parametrize(
    ("module", "text", "breaks_off", "is_good"),
    [
        (WORKER, "", False, True),
        (WORKER, "", True, False),
        (WORKER, "other", False, False),
        (HTTP, "", True, True),
        (HTTP, "other", False, False),
    ],
)
def test_only_the_http_process_may_break_streams_off_and_none_may_be_other(
    module: str, text: str, breaks_off: bool, is_good: bool
) -> None:
    row = kill(Breaking(text, breaks_off), module, TEXTS, 1)  # type: ignore[arg-type]
    assert (row.is_good, row.streams) == (is_good, 2)
