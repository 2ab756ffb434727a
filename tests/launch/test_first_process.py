"""The first process of a PID namespace, as in a container: signals, exit statuses, and orphans."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.waiting import eventually

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]

REAP = """
import os
from pathlib import Path
from mgpu.orchestrator.processes.child_process import ChildProcess

assert os.getpid() == 1
child = ChildProcess("child", ["sh", "-c", "sleep 1000 & exec sleep 1000"], b"", dict(os.environ))
children = lambda: Path("/proc/1/task/1/children").read_text().split()
while len(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()) != 1:
    pass
child.kill()
print(len(children()))
"""


@pytest.fixture(autouse=True)
def namespaces() -> None:
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no PID namespace can be made: {tried.stderr.strip()}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_first_process_with_the_status_of_a_shell(number: int, status: int) -> None:
    code = f"from mgpu.orchestrator.host.signals import end_process; end_process(-{int(number)})"
    assert subprocess.run([*UNSHARE, sys.executable, "-c", code], timeout=60).returncode == status


def test_sigterm_before_the_loop_of_the_server_ends_the_first_process(tmp_path: Path) -> None:
    fifo = tmp_path / "config.toml"
    os.mkfifo(fifo)
    command = [*UNSHARE, sys.executable, "-m", "mgpu.launch.cli", "serve", "--config", str(fifo)]
    with subprocess.Popen(command) as process:
        try:
            inner = eventually(lambda: psutil.Process(process.pid).children(), "the first process")[0]
            eventually(lambda: 1 << 14 & caught_signals(inner.pid), "its handler of SIGTERM")
            inner.send_signal(signal.SIGTERM)
            assert process.wait(20) == 143
        finally:
            process.kill()


def caught_signals(pid: int) -> int:
    """Return the mask of signals that have a handler; SIGTERM is bit 14."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))


def test_orphans_of_a_killed_child_are_reaped() -> None:
    done = subprocess.run([*UNSHARE, sys.executable, "-c", REAP], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0", done.stderr
