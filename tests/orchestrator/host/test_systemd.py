"""What systemd is told: by the rules of the notifier alone, and by whole servers with fake workers."""

import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness.servers.server_process import ServerProcess, ready_server, running_server
from harness.waiting import eventually
from mgpu.orchestrator.host.systemd import EXTEND_S, NOTIFY_INTERVAL_S, VARIABLES, Notifier
from mgpu.protocol.discovery import INFO_NAME
from mgpu.protocol.internal.worker_messages import LoadProgress

DEADLINE_S = 30.0
EXTEND = f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1e6:.0f}"
WATCHDOG_S = 60.0


class FakeManager:
    """The socket that systemd would listen on. ``messages`` holds one list of lines per datagram."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[list[str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)

    @property
    def lines(self) -> list[str]:
        return [line for message in self.messages for line in message]

    def read(self) -> list[str]:
        """Take in what is there and give its lines."""
        return self.read_for(0.0)

    def read_for(self, seconds: float) -> list[str]:
        """Take in what comes for so long: the only way to see that something does not come."""
        count, until_s = len(self.messages), time.monotonic() + seconds
        while self._receive(max(0.0, until_s - time.monotonic())):
            pass
        return [line for message in self.messages[count:] for line in message]

    def wait_for(self, wanted: Callable[[str], bool]) -> str:
        """Return the next wanted line. AssertionError at the deadline."""
        until_s, seen = time.monotonic() + DEADLINE_S, len(self.messages)
        while True:
            for line in (line for message in self.messages[seen:] for line in message):
                if wanted(line):
                    return line
            seen = len(self.messages)
            if not self._receive(max(0.0, until_s - time.monotonic())):
                raise AssertionError(f"waited in vain after {self.messages}")

    def _receive(self, timeout_s: float) -> bool:
        self._socket.settimeout(timeout_s)
        try:
            self.messages.append(self._socket.recv(65536).decode().split("\n"))
        except (TimeoutError, BlockingIOError):
            return False
        return True

    def close(self) -> None:
        self._socket.close()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def manager(folder: Path) -> Iterator[FakeManager]:
    manager = FakeManager(str(folder / "notify"))
    yield manager
    manager.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def notifier(manager: FakeManager, clock: Clock) -> Notifier:
    return Notifier(manager.address, WATCHDOG_S, clock)


def progress(*done_bytes: int, phase: str = "weights", total_bytes: int = 70_000_000_000) -> list[LoadProgress]:
    return [LoadProgress(0, rank, phase, done, total_bytes, 10.0) for rank, done in enumerate(done_bytes)]


# -- rules -------------------------------------------------------------------------------------------------------------


def test_nothing_happens_without_a_manager() -> None:
    silent = Notifier.from_environment({})
    silent.loading(progress(1), 1)
    silent.ready("serving")
    silent.serving(1, 2, 3.0)
    silent.reloading("keys")
    silent.stopping("done")


@pytest.mark.parametrize("address", ["/nowhere/notify", "@" + "x" * 20, "/" + "long" * 100, "relative", "/with\0null"])
def test_a_manager_that_cannot_be_reached_disturbs_nobody(address: str, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier(address)
    notifier.ready("serving")
    notifier.stopping("done")
    assert len(caplog.records) == 1, "said once"


def test_a_manager_that_does_not_read_holds_up_no_step(manager: FakeManager, clock: Clock, notifier: Notifier) -> None:
    began_s = time.monotonic()
    for running in range(2000):
        clock.now_s += NOTIFY_INTERVAL_S
        notifier.serving(running, 0, 0.0)
    assert time.monotonic() - began_s < 10.0
    assert len(manager.read()) < 4000, "the queue was full"


def test_the_abstract_namespace_is_reached() -> None:
    manager = FakeManager(f"@mgpu-test-{secrets.token_hex(8)}")
    Notifier(manager.address).ready("serving")
    assert manager.read() == ["READY=1", "STATUS=serving"]
    manager.close()


def test_the_variables_are_taken_out_of_the_environment(manager: FakeManager) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "A": "b"}
    Notifier.from_environment(environ).ready("serving")
    assert environ == {"A": "b"}
    assert manager.read() == ["READY=1", "STATUS=serving", "WATCHDOG=1"]


@pytest.mark.parametrize("variables", [{"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {}])
def test_a_watchdog_for_someone_else_or_none_is_not_fed(manager: FakeManager, variables: dict[str, str]) -> None:
    Notifier.from_environment({"NOTIFY_SOCKET": manager.address, **variables}).ready("serving")
    assert manager.read() == ["READY=1", "STATUS=serving"]


def test_loading_is_given_more_time_only_while_bytes_move(
    manager: FakeManager, clock: Clock, notifier: Notifier
) -> None:
    notifier.loading(progress(14_000_000_000, 14_700_000_000), 2)
    assert manager.read() == ["STATUS=loading weights 20% (28.7 of 140.0 GB, 2.9 GB/s)", EXTEND]
    notifier.loading(progress(15_000_000_000, 15_000_000_000), 2)
    assert manager.read() == [], "not more often than every few seconds"
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.loading(progress(15_000_000_000, 15_000_000_000), 2)
    assert EXTEND in manager.read(), "what moved since the last message counts"
    for _ in range(4):
        clock.now_s += NOTIFY_INTERVAL_S
        notifier.loading(progress(15_000_000_000, 15_000_000_000), 2)
        assert manager.read() == []


def test_a_load_that_hangs_is_called_so(manager: FakeManager, clock: Clock, notifier: Notifier) -> None:
    notifier.loading(progress(7), 1)
    manager.read()
    clock.now_s += EXTEND_S / 2
    notifier.loading(progress(7), 1)
    (status,) = manager.read()
    assert status.endswith("; nothing has moved for 60 s")


def test_ranks_that_have_not_begun_count_as_empty(manager: FakeManager, notifier: Notifier) -> None:
    notifier.loading(progress(35_000_000_000), 2)
    assert "loading weights 25%" in manager.read()[0]


def test_phases_without_bytes_are_named(manager: FakeManager, notifier: Notifier) -> None:
    notifier.loading(progress(0, 0, phase="warmup", total_bytes=0), 2)
    assert manager.read() == ["STATUS=starting 2 worker(s): warmup", EXTEND]


def test_the_watchdog_is_fed_in_time_while_steps_finish(manager: FakeManager, clock: Clock, notifier: Notifier) -> None:
    notifier.ready("serving m")
    assert manager.read() == ["READY=1", "STATUS=serving m", "WATCHDOG=1"]
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.serving(3, 1, 0.2)
    assert manager.read() == ["STATUS=serving m: 3 running, 1 waiting", "WATCHDOG=1"]
    for _ in range(12):
        clock.now_s += NOTIFY_INTERVAL_S
        notifier.serving(3, 1, 0.2)
        assert manager.read() == ["WATCHDOG=1"], "a status is said when it changes"


def test_a_busy_server_sends_one_message_an_interval(manager: FakeManager, clock: Clock, notifier: Notifier) -> None:
    notifier.ready("serving m")
    clock.now_s += NOTIFY_INTERVAL_S
    for running in range(100):  # turns of the loop in which the load changes
        notifier.serving(running, 0, 0.0)
    manager.read()
    assert len(manager.messages) == 2
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.serving(7, 0, 0.0)
    assert "STATUS=serving m: 7 running, 0 waiting" in manager.read()


def test_a_step_that_does_not_finish_starves_the_watchdog(
    manager: FakeManager, clock: Clock, notifier: Notifier
) -> None:
    notifier.ready("serving m")
    manager.read()
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.serving(1, 0, WATCHDOG_S / 3 + 1)
    assert manager.read() == ["STATUS=serving m: 1 running, 0 waiting; stalled, no step has finished for 21 s"]


def test_a_recovery_that_loads_feeds_the_watchdog(manager: FakeManager, clock: Clock, notifier: Notifier) -> None:
    notifier.ready("serving m")
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.loading(progress(1), 1)
    manager.read()
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.loading(progress(2), 1)
    assert manager.read()[-1] == "WATCHDOG=1"
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.loading(progress(2), 1)
    assert manager.read() == []


def test_finishing_requests_get_more_time_only_while_steps_finish(
    manager: FakeManager, clock: Clock, notifier: Notifier
) -> None:
    notifier.ready("serving m")
    notifier.stopping("finishing the last requests")
    assert manager.read()[-2:] == ["STOPPING=1", "STATUS=finishing the last requests"]
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.serving(2, 0, 0.1)
    assert manager.read() == ["STATUS=finishing the last requests: 2 running, 0 waiting", EXTEND]
    clock.now_s += NOTIFY_INTERVAL_S
    notifier.serving(2, 0, WATCHDOG_S)
    assert EXTEND not in manager.read()
    notifier.stopping("stopping the workers")
    assert manager.read() == ["STATUS=stopping the workers"], "STOPPING is said once"


def test_a_reload_carries_the_time_and_ends_with_ready(manager: FakeManager, notifier: Notifier) -> None:
    notifier.ready("serving m")
    manager.read()
    notifier.reloading("reading the keys again")
    assert manager.read()[:2] == ["RELOADING=1", manager.lines[-2]]
    name, _, usec = manager.lines[-2].partition("=")
    assert name == "MONOTONIC_USEC"
    assert 0 <= time.monotonic() - int(usec) / 1e6 < 10
    notifier.ready("serving m")
    assert manager.read()[0] == "READY=1"


def test_a_status_cannot_carry_another_message(manager: FakeManager, notifier: Notifier) -> None:
    notifier.stopping("failed:\nREADY=1\n\ud800")
    assert manager.read() == ["STOPPING=1", "STATUS=failed: READY=1 ?"]


# -- whole servers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def service(manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    """Let servers that are started now believe that they are a service, with a watchdog far shorter than usual."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    return manager


def is_status(text: str) -> Callable[[str], bool]:
    return lambda line: line.startswith("STATUS=") and text in line


def test_a_service_is_ready_after_loading_and_says_when_it_stops(folder: Path, service: FakeManager) -> None:
    with ready_server(folder, {"step_s": 0.01}) as server:
        service.wait_for(is_status("serving fake on ipc:///"))
        assert all(VARIABLES[0] not in child.environ() for child in server.children())
        server.submit(1, [1, 2, 3], 100)
        service.wait_for(is_status("1 running, 0 waiting"))
        server.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda line: line == "STOPPING=1")
        service.wait_for(is_status("stopping the workers"))
        assert server.wait_exit() == -signal.SIGTERM
        assert server.finish == {1: "length"}
    service.read()
    lines = service.lines
    changes = [line for line in lines if line in ("READY=1", "STOPPING=1")]
    assert changes == ["READY=1", "STOPPING=1"]
    assert EXTEND in lines[: lines.index("READY=1")]
    assert "WATCHDOG=1" in lines[lines.index("READY=1") : lines.index("STOPPING=1")]
    assert lines[-1] == "STATUS=stopping the workers"


def test_a_load_that_hangs_gets_no_more_time(folder: Path, service: FakeManager) -> None:
    with running_server(folder, {"fail": "hang", "fail_phase": "weights"}) as server:
        service.wait_for(is_status("loading weights 50%"))
        service.read_for(0.5)  # the extension for the bytes that did move
        assert service.read_for(1.0) == []
        server.process.send_signal(signal.SIGTERM)
        server.wait_exit()
    assert "READY=1" not in service.lines


def test_the_watchdog_starves_when_a_worker_is_stopped_while_work_is_queued(folder: Path, service: FakeManager) -> None:
    with ready_server(folder, {"step_s": 0.01}, ranks_per_stage=2) as server:
        worker = worker_of(server, "0")
        worker.suspend()
        service.wait_for(lambda line: line == "WATCHDOG=1")  # an idle server lives, whatever its workers do
        server.submit(1, [1, 2, 3], 100)
        service.wait_for(is_status("stalled"))
        assert "WATCHDOG=1" not in service.read_for(1.5)
        worker.resume()
        service.wait_for(lambda line: line == "WATCHDOG=1")
        server.wait_for(lambda: 1 in server.finish)


def test_the_status_of_a_failed_service_says_why(folder: Path, service: FakeManager) -> None:
    with running_server(folder, {"fail": "exit", "fail_phase": "weights"}) as server:
        assert server.wait_exit() == 1
    service.read()
    assert "STOPPING=1" in service.lines
    assert service.lines[-1].startswith("STATUS=failed: worker 0 failed in phase")


def test_the_status_of_a_server_that_lost_its_folder_says_why(folder: Path, service: FakeManager) -> None:
    with ready_server(folder) as server:
        eventually(lambda: any((folder / "run").rglob(INFO_NAME)))  # what is still to be written there cannot be
        shutil.rmtree(folder / "run")
        (folder / "run").touch()
        worker_of(server, "0").kill()
        server.wait_exit()
        service.read()
    assert service.lines[-1].startswith("STATUS=failed: cannot make")


def worker_of(server: ServerProcess, rank: str) -> psutil.Process:
    """Find the worker of a rank; every rank steps, but only the output rank answers."""
    (worker,) = [child for child in server.children() if child.environ().get("RANK") == rank]
    return worker
