"""Whoever has bound an ipc endpoint keeps it, however another server's end and start fall together."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from mgpu.orchestrator.gateway.front.endpoint import BindError, bind, check_endpoint, release

NewSocket = Callable[[], "zmq.Socket[bytes]"]


@pytest.fixture
def new_socket() -> Iterator[NewSocket]:
    """Make sockets that are closed after the test."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def make() -> "zmq.Socket[bytes]":
        made.append(context.socket(zmq.ROUTER))
        return made[-1]

    yield make
    context.destroy(linger=0)


@pytest.fixture
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"ipc://{tmp_path_factory.mktemp('x')}/front"


def lock_file(endpoint: str) -> Path:
    return Path(endpoint.removeprefix("ipc://") + ".lock")


def test_an_endpoint_has_one_owner_until_it_is_released(new_socket: NewSocket, endpoint: str) -> None:
    first = new_socket()
    _, lock = bind(first, endpoint)
    with pytest.raises(BindError, match="another server is listening"):
        bind(new_socket(), endpoint)
    first.close(linger=0)
    release(endpoint, lock)
    assert not lock_file(endpoint).exists()
    _, lock = bind(new_socket(), endpoint)
    os.close(lock)


@pytest.mark.parametrize(
    ("host", "has_keys", "words"),
    [
        ("127.0.0.1", False, r"process PID \(.*\) is listening there; choose"),
        ("192.0.2.1", True, "no such address; see"),
    ],
)
def test_what_stands_in_the_way_of_a_port_is_said(new_socket: NewSocket, host: str, has_keys: bool, words: str) -> None:
    taken, _ = bind(new_socket(), "tcp://127.0.0.1:0")
    port = taken.rpartition(":")[2]
    with pytest.raises(BindError, match=words.replace("PID", str(os.getpid()))):
        bind(new_socket(), f"tcp://{host}:{port}", has_keys)


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_loopback_is_named_by_its_address(has_keys: bool) -> None:
    with pytest.raises(BindError, match=r"cannot bind tcp://localhost:55: write the address, tcp://127.0.0.1:55"):
        check_endpoint("tcp://localhost:55", has_keys)


def test_a_lock_file_that_was_removed_while_it_was_being_locked_locks_nothing(
    new_socket: NewSocket, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends removes its lock file between another one's open and flock."""
    real_flock, removed = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not removed:
            removed.append(fd)
            lock_file(endpoint).unlink()
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    _, lock = bind(new_socket(), endpoint)
    try:
        assert removed
        with pytest.raises(BindError, match="another server is listening"):
            bind(new_socket(), endpoint)
    finally:
        os.close(lock)


def test_a_lock_file_that_vanishes_every_time_is_refused(
    new_socket: NewSocket, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: lock_file(endpoint).unlink())
    with pytest.raises(BindError, match="was removed 100 times"):
        bind(new_socket(), endpoint)
