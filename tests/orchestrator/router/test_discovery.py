"""Servers that are typed, listed, or found by a name; all of it is read again."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from harness.waiting import eventually
from mgpu.orchestrator.router import discovery as module
from mgpu.orchestrator.router.discovery import Discovery, ServerListError, addresses_of


class NameServer:
    def __init__(self) -> None:
        self.addresses = {"servers.test": ["10.0.0.2", "10.0.0.1"]}
        self.asked: list[str] = []
        self.hangs = False
        self.may_answer = threading.Event()

    def look_up(self, name: str, port: int) -> list[str]:
        self.asked.append(name)
        if self.hangs:
            assert self.may_answer.wait(60)
        if name not in self.addresses:
            raise OSError("no such name")
        return [f"tcp://{each}:{port}" for each in sorted(self.addresses[name])]


@pytest.fixture
def names() -> NameServer:
    return NameServer()


def test_a_name_stands_for_all_of_its_addresses_and_is_looked_up_again(names: NameServer) -> None:
    found = Discovery(["ipc:///a", "dns://servers.test:5555"], None, names.look_up)
    assert found.endpoints() == ["ipc:///a", "tcp://10.0.0.1:5555", "tcp://10.0.0.2:5555"]
    names.addresses["servers.test"] = ["10.0.0.2", "10.0.0.3"]
    wanted = ["ipc:///a", "tcp://10.0.0.2:5555", "tcp://10.0.0.3:5555"]
    eventually(lambda: found.endpoints() == wanted, found.endpoints)


def test_the_last_addresses_stay_while_a_name_server_fails_or_hangs(names: NameServer) -> None:
    found = Discovery(["dns://servers.test:1"], None, names.look_up)
    before, _ = found.endpoints(), names.addresses.clear()
    for count in (3, 5):
        eventually(lambda: (found.endpoints(), len(names.asked) > count)[1], names.asked)  # noqa: B023
    assert found.endpoints() == before == ["tcp://10.0.0.1:1", "tcp://10.0.0.2:1"]
    names.hangs = True
    asked = len(names.asked)
    eventually(lambda: (found.endpoints(), len(names.asked) > asked)[1], names.asked)
    assert [found.endpoints() for _ in range(50)] == [before] * 50
    assert len(names.asked) <= asked + 2, "one question at a time"
    names.may_answer.set()


def test_a_name_without_addresses_may_get_some_later(names: NameServer) -> None:
    found = Discovery(["dns://later.test:5555"], None, names.look_up)
    assert found.endpoints() == []
    names.addresses["later.test"] = ["10.0.0.9"]
    eventually(lambda: found.endpoints() == ["tcp://10.0.0.9:5555"], found.endpoints)


def test_a_file_is_read_again_and_a_wrong_one_changes_nothing(tmp_path: Path, names: NameServer) -> None:
    file = tmp_path / "servers"
    file.write_text("# all\nipc:///a\n\ndns://servers.test:7 # two\n")
    found = Discovery([], file, names.look_up)
    both = ["ipc:///a", "tcp://10.0.0.1:7", "tcp://10.0.0.2:7"]
    assert found.endpoints() == both
    for wrong in ("localhost\n", "", "ipc:///a\nipc:///a\n"):
        file.write_text(wrong)
        assert found.endpoints() == both
    file.unlink()
    assert found.endpoints() == both
    file.write_text("ipc:///b\n")
    assert found.endpoints() == ["ipc:///b"]


def test_two_names_of_one_server_count_once(names: NameServer) -> None:
    found = Discovery(["tcp://10.0.0.1:7", "dns://servers.test:7"], None, names.look_up)
    assert found.endpoints() == ["tcp://10.0.0.1:7", "tcp://10.0.0.2:7"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "no servers: name each with --replica"),
        (["localhost:5"], "no endpoint of a server; write ipc:///PATH, tcp://ADDRESS:PORT or dns://NAME:PORT"),
        (["tcp://host"], "no endpoint"),
        (["tcp://host:0"], "port 0; ports are 1 to 65535"),
        (["tcp://host:99999"], "port 99999"),
        (["tcp://[::1]:70000"], "port 70000"),
        (["dns://name"], "no endpoint"),
        (["dns://na me:5"], "no endpoint"),
        (["dns://[::1]:5"], "no endpoint"),
        (["ipc:///a", "ipc:///a"], "ipc:///a is named twice"),
    ],
)
def test_a_wrong_list_is_refused_with_the_way_out(lines: list[str], problem: str) -> None:
    with pytest.raises(ServerListError, match=problem.replace("[", r"\[")):
        Discovery(lines, None, NameServer().look_up)


@pytest.mark.parametrize(
    ("records", "endpoints"),
    [
        ([(socket.AF_INET, "10.0.0.2"), (socket.AF_INET6, "fd00::2"), (socket.AF_INET, "10.0.0.1")],
         ["tcp://10.0.0.1:5", "tcp://10.0.0.2:5"]),
        ([(socket.AF_INET6, "fd00::2")], ["tcp://[fd00::2]:5"]),
        ([(socket.AF_INET, "10.0.0.1"), (socket.AF_INET, "10.0.0.1")], ["tcp://10.0.0.1:5"]),
    ],
)  # fmt: skip
def test_a_host_with_both_kinds_of_addresses_is_one_server(
    records: list[tuple[int, str]], endpoints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any, **__: Any) -> list[Any]:
        return [(family, 1, 6, "", (address, 5)) for family, address in records]

    monkeypatch.setattr(module.socket, "getaddrinfo", answer)
    assert addresses_of("name", 5) == endpoints
