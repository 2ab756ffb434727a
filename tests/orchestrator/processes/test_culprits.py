"""Whose input the gateway died of: shut out for a growing time; what killed twice is not tried again."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.fake_model import solo_tokens
from harness.servers.gateway_loss import endpoint_of
from harness.servers.mortal_gateway import ABORT, COMMAND, SPIN
from harness.servers.raw_peer import RawPeer
from harness.servers.server_process import running_server
from harness.waiting import eventually
from mgpu import Client, RequestFailed
from mgpu.orchestrator.processes.culprits import Culprits
from mgpu.protocol.internal.process.work_record import Work, WorkRecord, name_of

KEY, OTHER = "key:0123456789abcdef", "key:fedcba9876543210"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def culprits(clock: Clock) -> Iterator[Culprits]:
    found = Culprits(clock)
    yield found
    found.close()


def die_of(culprits: Culprits, owner: str, body: bytes) -> bytes:
    """Let a gateway die while it works on a message; return its name."""
    record = WorkRecord(culprits.fd)
    culprits.begin()
    name = name_of(owner, body)
    record.begin(Work(owner, name))
    culprits.note_death()
    record.close()
    return name


def test_a_key_is_shut_out_for_a_growing_and_bounded_time(culprits: Culprits, clock: Clock) -> None:
    seconds = []
    for at in range(9):
        die_of(culprits, KEY, b"%d" % at)
        assert set(culprits.shut_out()) == {KEY}
        seconds.append(culprits.shut_out()[KEY])
    assert seconds == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    clock.now_s += 63
    assert culprits.shut_out() == {KEY: 1.0}
    clock.now_s += 1
    assert culprits.shut_out() == {}
    clock.now_s += 300  # five quiet minutes
    die_of(culprits, KEY, b"again")
    assert culprits.shut_out() == {KEY: 8.0}


def test_a_process_is_kept_out_for_less_than_clients_wait(culprits: Culprits) -> None:
    for at in range(9):
        die_of(culprits, "pid:1", b"%d" % at)
    assert culprits.shut_out() == {"pid:1": 2.0}


def test_a_message_that_killed_twice_is_refused_and_one_that_was_handled_is_innocent(culprits: Culprits) -> None:
    bad = die_of(culprits, KEY, b"bad")
    innocent = die_of(culprits, OTHER, b"innocent")
    assert set(culprits.died_of(once=True)) == {bad, innocent}
    assert die_of(culprits, KEY, b"bad") == bad
    culprits.clear(innocent)
    assert (culprits.died_of(once=True), culprits.died_of(once=False)) == ([], [bad])
    die_of(culprits, OTHER, b"another")
    assert culprits.shut_out()[OTHER] == 1.0, "it begins anew"


def test_who_speaks_for_many_is_never_shut_out(culprits: Culprits) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for owner in ("192.0.2.1", "", f"pid:{os.getpid()}", f"pid:{child.pid}"):
            die_of(culprits, owner, b"x")
            assert culprits.shut_out() == {}
    finally:
        child.kill()
        child.communicate()


def test_who_fills_the_memory_is_accused_by_the_gateway_itself(culprits: Culprits) -> None:
    record = WorkRecord(culprits.fd)
    culprits.begin()
    record.begin(Work(OTHER, bytes(16)))
    record.end()
    record.accuse(KEY)
    blame = culprits.note_death()
    assert blame is not None
    assert blame.owner == KEY
    assert culprits.shut_out() == {KEY: 1.0}
    assert culprits.died_of(once=True) == []
    culprits.begin()
    assert culprits.note_death() is None
    record.close()


@pytest.mark.parametrize("text", ["", "x" * 500, "ö" * 60, "pid:1"])
def test_any_owner_can_be_noted(text: str) -> None:
    record = WorkRecord(-1)
    record.accuse(text)
    assert record.accused() == text.encode()[:95].decode(errors="replace")
    record.begin(Work(text, b"n" * 16))
    assert record.work() == Work(record.accused(), b"n" * 16)
    record.close()


@pytest.mark.parametrize(("poison", "deaths"), [(ABORT, "SIGABRT"), (SPIN, "it hangs")])
def test_a_request_that_the_gateway_died_of_twice_is_refused_and_no_other(
    folder: Path, poison: int, deaths: str
) -> None:
    """Although not one failure of the gateway is allowed."""
    options = {"step_s": 0.01}
    with running_server(folder, options, gateway_command=COMMAND, max_restarts=0, gateway_timeout_s=2.0) as server:
        endpoint = endpoint_of(server, folder)
        with Client(endpoint, silence_timeout_s=60) as client, Client(endpoint, silence_timeout_s=60) as other:
            stream = other.stream([5, 6, 7], max_tokens=200, ignore_eos=True)
            tokens = [*next(stream).token_ids]
            with pytest.raises(RequestFailed, match="twice"):  # the client may notice it before the server says it
                client.generate([poison], max_tokens=5)
            for piece in stream:
                tokens += piece.token_ids
            assert tokens == solo_tokens([5, 6, 7], 200)
            assert client.stats()["gateway_restarts"] >= 2, server.log
        assert server.log.count(deaths) >= 2, server.log
        assert f"the gateway has died of input of pid:{os.getpid()}, shut out for 2 s" in server.log


POISONER = """
import sys, msgpack, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt(zmq.RECONNECT_IVL, 20)
socket.connect(sys.argv[1])
for at in range(10**6):  # a new message each time
    body = {"type": "generate", "id": at, "prompt_ids": bytes.fromhex(sys.argv[2]) + at.to_bytes(4, "little")}
    socket.send_multipart([b"mgpu1", msgpack.packb(body)])
    socket.poll(50)
"""


def test_who_kills_the_gateway_again_and_again_is_kept_out_while_others_are_served(folder: Path) -> None:
    poison = struct.pack("<i", ABORT).hex()
    with running_server(folder, {"step_s": 0.01}, gateway_command=COMMAND, max_restarts=0) as server:
        endpoint = endpoint_of(server, folder)
        child = subprocess.Popen([sys.executable, "-c", POISONER, endpoint, poison])
        try:
            eventually(lambda: f"pid:{child.pid}, shut out for 2 s" in server.log, lambda: server.log)
            with Client(endpoint) as client:
                for _ in range(3):
                    assert list(client.generate([5, 6, 7], max_tokens=5).token_ids) == solo_tokens([5, 6, 7], 5)
        finally:
            child.kill()
            child.wait()
        assert server.process.poll() is None, server.log


def test_a_refused_message_leaves_its_connection_alone(folder: Path) -> None:
    with running_server(folder, {"step_s": 0.01}, gateway_command=COMMAND, max_restarts=0) as server:
        endpoint = endpoint_of(server, folder)
        fields = {"type": "generate", "id": 7, "prompt_ids": struct.pack("<i", ABORT), "max_tokens": 1}
        for at in range(2):
            peer = RawPeer(endpoint)
            peer.say(**fields)
            eventually(lambda at=at: server.log.count("SIGABRT") == at + 1, lambda: server.log)  # type: ignore[misc]
            peer.close()
        peer = RawPeer(endpoint)
        peer.say(**fields)
        failed = peer.hear()
        assert (failed["type"], failed["id"], failed["code"]) == ("failed", 7, "engine_error")
        peer.say(type="generate", id=8, prompt_ids=struct.pack("<i", 5), max_tokens=1)
        assert peer.hear()["type"] == "accepted"
        peer.close()
