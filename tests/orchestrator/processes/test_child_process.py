"""Children: their spec, their death, their end."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from harness.assertions import assert_has_all
from mgpu.orchestrator.processes.child_process import ChildProcess, ProcessStartError, describe_exit
from mgpu.orchestrator.processes.failures import ending_of

READ_SPEC = "import sys; n = int.from_bytes(sys.stdin.buffer.read(4), 'little'); spec = sys.stdin.buffer.read(n); "


@pytest.fixture
def children() -> Iterator[list[ChildProcess]]:
    started: list[ChildProcess] = []
    yield started
    for child in started:
        child.kill()


def start(children: list[ChildProcess], code: str, spec: bytes = b"spec") -> ChildProcess:
    children.append(ChildProcess("test", [sys.executable, "-c", READ_SPEC + code], spec, os.environ))
    return children[-1]


def soon() -> float:
    return time.monotonic() + 10


def test_a_child_reads_its_spec_and_its_exit_code_is_seen(children: list[ChildProcess]) -> None:
    child = start(children, "sys.exit(5 if spec == b'spec' else 6)")
    assert child.wait(soon())
    assert child.exit_status() == 5
    assert child.exit_status() == 5, "looking does not reap"
    child.kill()
    assert child.exit_status() == 5


def test_a_child_sees_end_of_file_when_standard_input_is_closed(children: list[ChildProcess]) -> None:
    child = start(children, "sys.exit(3 if sys.stdin.buffer.read() == b'' else 4)")
    assert not child.wait(time.monotonic())
    child.close_stdin()
    assert child.wait(soon())
    assert child.exit_status() == 3


def test_death_by_signal_is_told_from_exit(children: list[ChildProcess]) -> None:
    child = start(children, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert child.wait(soon())
    assert child.exit_status() == -signal.SIGKILL


def test_a_child_that_dies_before_reading_does_not_disturb_the_parent(children: list[ChildProcess]) -> None:
    children.append(ChildProcess("test", [sys.executable, "-c", "0"], b"x" * 50_000, os.environ))
    assert children[0].wait(soon())
    assert children[0].exit_status() == 0


def test_a_wait_ends_when_the_interrupt_is_readable(children: list[ChildProcess]) -> None:
    child = start(children, "sys.stdin.buffer.read()")
    reader, writer = os.pipe()
    os.write(writer, b"!")
    assert not child.wait(soon(), reader)
    os.close(reader)
    os.close(writer)


def test_reaping_kills_grandchildren_of_the_same_session(children: list[ChildProcess]) -> None:
    reader, writer = os.pipe()
    code = f"import os, subprocess; subprocess.Popen(['sleep', '100']); os.write({writer}, b'!'); sys.stdin.read()"
    command = [sys.executable, "-c", READ_SPEC + code]
    child = ChildProcess("test", command, b"", os.environ, pass_fds=[writer])
    children.append(child)
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    grandchildren = psutil.Process(child.pid).children()
    child.kill()
    _, alive = psutil.wait_procs(grandchildren, timeout=10)
    assert grandchildren
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_reaped_child_is_not_looked_for_behind_a_descriptor_that_is_another_ones_now(
    children: list[ChildProcess],
) -> None:
    first = start(children, "0")
    first.kill()
    second = start(children, "sys.stdin.read()")
    first.pidfd = second.pidfd  # the system gives free numbers again
    assert first.wait(time.monotonic())
    first.send_signal(signal.SIGKILL)
    assert not second.wait(time.monotonic() + 0.1)


def test_a_spec_that_could_block_the_parent_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes, at most"):
        ChildProcess("test", ["true"], b"x" * 2_000_000, os.environ)


def test_exits_are_described_in_words() -> None:
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-11) == "was killed by signal 11 (SIGSEGV)"
    assert "memory runs out" in describe_exit(-9)
    assert "an unknown signal" in describe_exit(-200)


def no_descriptor(pid: int) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_child_that_cannot_be_watched_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(psutil.Process().children())
    monkeypatch.setattr(os, "pidfd_open", no_descriptor)
    with pytest.raises(OSError, match="Too many open files"):
        ChildProcess("test", [sys.executable, "-c", "input()"], None, os.environ)
    assert set(psutil.Process().children()) <= before


def test_a_child_that_cannot_be_started_is_named_with_the_limit_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(ProcessStartError) as refused:
        ChildProcess("worker 3", ["true"], None, os.environ)
    text, status = ending_of(refused.value, is_announced=True)
    assert status == 1
    assert_has_all(text, "worker 3 cannot be started", "temporarily unavailable", "ulimit -u")
    assert text in caplog.text
    assert "Traceback" not in caplog.text
