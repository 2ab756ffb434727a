"""The fault tests of `make chaos` in their shortest form: a worker and the gateway die under real streams."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import msgpack
import pytest
import zmq

from bench.chaos.bad_inputs import FIELDS, FRAMES, Peer
from bench.chaos.table import Row
from harness.models.text_model import write_text_model

FAULTS = {
    "--gateway-kills": (1, "SIGKILL of the gateway"),
    "--gone-clients": (10, "client gone mid-prefill, mid-decode"),
    "--bad-inputs": (100, "bad fields, frames and bytes"),
    "--kills": (1, "SIGKILL of a worker, decode"),
}
"""What is done how often, and the row that tells of it. How a server ends is in e2e/test_lifecycle.py."""
LOAD_VOCABULARY = 40_000
"""Prompts of the load have tokens below it."""
DEADLINE_S = 300.0
"""A minute on two cores that other programs use too."""


@pytest.mark.timeout(DEADLINE_S + 30)
def test_no_fault_loses_repeats_or_changes_a_token_or_leaves_anything_behind(tmp_path: Path) -> None:
    options = [word for name, (count, _) in FAULTS.items() for word in (name, str(count))]
    (tmp_path / "model").mkdir()
    model = str(write_text_model(tmp_path / "model", LOAD_VOCABULARY))
    shape = ["--model", model, "--workers", "2", "--streams", "4", "--answer-tokens", "60", "--one-server", "--only"]
    command = [sys.executable, "-m", "bench.chaos", *shape, *options, "--save", str(tmp_path)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S)
    assert ran.returncode == 0, ran.stdout
    rows = {row["fault"]: row for row in json.loads((tmp_path / "chaos.json").read_text())["rows"]}
    for count, fault in FAULTS.values():
        row = rows.pop(fault)
        assert row["injections"] >= count, row
        assert (row["lost"], row["repeated"], row["different"], row["problems"]) == (0, 0, 0, []), row
        assert row["finished"] > 0, "nothing was compared"
    assert not rows, "a row that nobody asked for"


def accept_everything(socket: "zmq.Socket[bytes]", over: threading.Event) -> None:
    """Be a server that refuses nothing."""
    while not over.is_set():
        if socket.poll(20):
            client, *frames = socket.recv_multipart()
            try:
                request = msgpack.unpackb(frames[-1])
            except ValueError:
                request = None
            known = request.get("id", 0) if isinstance(request, dict) else 0
            socket.send_multipart([client, b"mgpu1", msgpack.packb({"type": "accepted", "id": known})])


def test_every_bad_input_that_is_not_refused_is_a_problem(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(endpoint := f"ipc://{tmp_path}/front")
    over = threading.Event()
    server = threading.Thread(target=accept_everything, args=(router, over))
    server.start()
    row = Row("bad inputs")
    try:
        with Peer(endpoint) as peer:
            peer.send_wave(row)
    finally:
        over.set()
        server.join()
        context.destroy(linger=0)
    assert len(row.problems) == len(FIELDS) + len(FRAMES) + 2
