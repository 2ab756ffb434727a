"""How every command ends when something around it fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.waiting import eventually

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_finds_no_room_ends_in_one_message(unbuffered: str) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mgpu.launch.cli", "config"], env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 74
    assert done.stderr.splitlines() == [
        "error: cannot write everything: [Errno 28] No space left on device; make room where the output goes"
    ]


def run(*arguments: str, encoding: str, data: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "mgpu.launch.cli", *arguments], env={**os.environ, "PYTHONIOENCODING": encoding},
        input=data, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_package_can_be_run_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mgpu", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("mgpu-launch, version ")


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback() -> None:
    code = """if True:
        import os, signal, sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "mgpu.launch.cli":
                    os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground
        sys.meta_path.insert(0, Finder())
        from mgpu.__main__ import main
        main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_terminal_that_lacks_a_letter_gets_a_question_mark() -> None:
    done = run("bench", "decode", "--help", encoding="latin-1")
    assert done.returncode == 0, done.stderr
    assert b"--batches N,N,?" in done.stdout


def test_a_prompt_in_another_encoding_is_refused() -> None:
    done = run("generate", "-", encoding="utf-8", data="Müller".encode("latin-1"))
    assert done.returncode == 78
    assert done.stderr.startswith(b"error: standard input is no utf-8 text from byte 1 on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_benchmark_that_is_ended_leaves_no_files(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "mgpu.launch.cli", "bench", "idle", "--shape", "tiny", "--bandwidth", "1GB/s"]
    process = subprocess.Popen([*command, "--", "--device", "cpu"], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        eventually(lambda: list(tmp_path.glob("*/*/lock")) or process.poll() is not None, "no server is started")
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []


CLOSED_FILES = """
import os, subprocess, sys
from mgpu.launch.cli import open_standard_files
for fd in range(3):
    os.close(fd)
sys.stdin = sys.stdout = sys.stderr = None
open_standard_files()
assert sys.stdin and sys.stdout and sys.stderr
look = "import os; [os.path.samestat(os.fstat(fd), os.stat(os.devnull)) or 1 / 0 for fd in range(3)]"
sys.exit(subprocess.run([sys.executable, "-c", look], stdout=2).returncode)
"""


def test_a_standard_file_that_is_closed_is_replaced_for_children_too() -> None:
    assert subprocess.run([sys.executable, "-c", CLOSED_FILES], timeout=60, check=False).returncode == 0
