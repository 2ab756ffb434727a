"""The parent's side of the HTTP process: what it is started with, and what it is told meanwhile."""

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mgpu.orchestrator.processes import http_process
from mgpu.orchestrator.processes.failures import HttpLost
from mgpu.orchestrator.processes.http_process import HttpProcess
from mgpu.protocol.internal.http_spec import HTTP_LINK, READY, ApiKey, HttpOptions, HttpSpec, NewApiKeys

ALICE, BOB, CAROL = ([ApiKey(name, name.encode())] for name in ("alice", "bob", "carol"))


class Child:
    """A process that is ready at once."""

    pidfd = -1
    all: list["Child"]

    def __init__(self, name: str, command: object, spec: bytes, environment: object, fds: tuple[int, int]) -> None:
        self.spec = cast("HttpSpec", HTTP_LINK.decode(spec))
        self.told: list[object] = []
        os.write(fds[1], READY)
        Child.all.append(self)

    def tell(self, data: bytes) -> None:
        self.told.append(HTTP_LINK.decode(data))

    def kill(self) -> None:
        pass


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> HttpProcess:
    monkeypatch.setattr(http_process, "ChildProcess", Child)
    Child.all = []
    listener: Any = SimpleNamespace(
        socket=SimpleNamespace(fileno=lambda: 99), address=SimpleNamespace(path="", is_loopback_port=True)
    )
    return HttpProcess(listener, HttpOptions(api_keys=ALICE, cors=["*"]), [])


def start(process: HttpProcess) -> Child:
    assert process.start_if_due("ipc:///front")
    assert process.notice([process.fds[-1]])
    return Child.all[-1]


def test_other_api_keys_reach_the_process_and_those_that_replace_it(process: HttpProcess) -> None:
    with process:
        first = start(process)
        assert first.spec.options.api_keys == ALICE
        process.reload(BOB)
        assert first.told == [NewApiKeys(BOB)]
        process.replace(HttpLost("it was killed"))
        second = start(process)
        assert (second.spec.options, second.told) == (HttpOptions(api_keys=BOB, cors=["*"]), [])
        process.replace(HttpLost("it was killed"))
        process.reload(CAROL)  # while there is none
        assert second.told == []
        assert process.pause_left_s() > 0.0
        process._start_at_s = 0.0
        assert start(process).spec.options.api_keys == CAROL
        process.reload(None)
        assert Child.all[-1].told == [NewApiKeys(None)]


def test_a_process_that_was_never_ready_is_not_replaced(process: HttpProcess) -> None:
    with process, pytest.raises(HttpLost, match="no module"):
        process.replace(HttpLost("no module"))
