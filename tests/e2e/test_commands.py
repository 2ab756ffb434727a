"""The commands that people type, run as they type them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mgpu.launch.server_process import ServerProcess


def run(server: ServerProcess, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mgpu.launch.cli", *arguments],
        env=server.environ,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_generate_finds_the_running_server_and_prints_the_text(server: ServerProcess, endpoint: str) -> None:
    done = run(server, "generate", "The capital of France is", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_chat_keeps_the_conversation(server: ServerProcess, endpoint: str) -> None:
    done = run(server, "chat", "--max-tokens", "8", stdin="My name is Ada.\nWhat is my name?\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens/s]") == 2


def test_status_tells_the_state(server: ServerProcess, endpoint: str) -> None:
    done = run(server, "status", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["health"]["state"] == "ready"
    assert facts["models"][0]["max_seq_len"] == 1024
    assert facts["stats"]["kv_blocks_total"] > 0
    assert facts["stats"]["tokens_per_s"] >= 0


@pytest.mark.parametrize("command", [["status"], ["top"], ["status", "--stats"]])
def test_the_status_page_is_printed_once_where_there_is_no_terminal(
    command: list[str], server: ServerProcess, endpoint: str
) -> None:
    done = run(server, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("READY")
    assert ("step_ms_le_10" in done.stdout) == ("--stats" in command)
    assert "\x1b" not in done.stdout
    for word in ("tokens/s", "running", "waiting", "KV cache", "restarts"):
        assert word in done.stdout


@pytest.mark.parametrize("command", [["generate", "x"], ["chat"], ["status"], ["top"]])
def test_without_a_server_the_error_says_how_to_start_one(command: list[str], server: ServerProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mgpu.launch.cli", *command],
        env={**server.environ, "MGPU_RUNTIME_DIR": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 69
    assert "mgpu-launch serve" in done.stderr
    assert "Traceback" not in done.stderr


def names(process: psutil.Process, folder: Path) -> bool:
    """Say whether a process was started with this folder for its temporary files."""
    return (process.info["environ"] or {}).get("TMPDIR") == str(folder)


def test_the_demo_shows_layout_and_speed_and_stops_everything(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mgpu.launch.cli", "demo", "--max-tokens", "12"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert "everything stopped" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert not [process for process in psutil.process_iter(["environ"]) if names(process, tmp_path)]
    assert "layout:" in done.stderr
