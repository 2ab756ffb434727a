"""Limits, folders, memory and the hub: what is well, what is a warning, what is a failure."""

import http.server
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from mgpu.launch.doctor import machine
from mgpu.launch.doctor.finding import WIDTH, Finding, fail, finding_text, ok, warn
from mgpu.launch.doctor.hub import check_hub
from mgpu.orchestrator.processes.task_limits import TaskLimit

GIB = 1 << 30


def levels(found: Iterator[Finding], check: str) -> list[str]:
    return [each.level for each in found if each.check == check]


@pytest.mark.parametrize(("soft", "hard", "level"), [
    (1024, 1 << 20, "ok"), (8192, 8192, "ok"), (256, 1024, "warn"), (64, 64, "FAIL"),
    (100, resource.RLIM_INFINITY, "ok"),
])  # fmt: skip
def test_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, level: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    assert levels(machine.check_limits(cuda=False), "open files") == [level]


@pytest.mark.parametrize(("most", "used", "level"), [(4096, 100, "ok"), (512, 400, "warn"), (120, 110, "FAIL")])
def test_processes(monkeypatch: pytest.MonkeyPatch, most: int, used: int, level: str) -> None:
    monkeypatch.setattr(machine, "least_task_limit", lambda: TaskLimit("ulimit -u", most, used, "raise it"))
    found = [each for each in machine.check_limits(cuda=False) if each.check == "processes"]
    assert [each.level for each in found] == [level]
    assert_has_all(found[0].text, "ulimit -u", str(most), str(used))
    assert ("raise it" in found[0].advice) == (level != "ok")


@pytest.mark.parametrize(("locked", "cuda", "level"), [
    (64 << 10, True, "warn"), (64 << 10, False, "ok"), (resource.RLIM_INFINITY, True, "ok"),
])  # fmt: skip
def test_locked_memory(monkeypatch: pytest.MonkeyPatch, locked: int, cuda: bool, level: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (locked, locked))
    assert levels(machine.check_limits(cuda), "locked memory") == [level]


@pytest.mark.parametrize(("megabytes", "gpus", "level"), [(64, 2, "warn"), (64, 1, "ok"), (1024, 8, "ok")])
def test_shared_memory_matters_between_gpus(
    monkeypatch: pytest.MonkeyPatch, megabytes: int, gpus: int, level: str
) -> None:
    facts = os.statvfs_result((4096, 4096, 0, megabytes << 8, megabytes << 8, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda folder: facts)
    found = list(machine.check_shared_memory(gpus))
    assert [each.level for each in found] == [level]
    if level == "warn":
        assert "--shm-size" in found[0].advice


def test_a_missing_shared_memory_folder_is_told(tmp_path: Path) -> None:
    [found] = machine.check_shared_memory(2, tmp_path / "none")
    assert (found.level, "No such file" in found.text) == ("warn", True)


def test_limits_of_control_groups_are_told(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    (tmp_path / "proc/self").mkdir(parents=True)
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    for name, text in (("memory.max", f"{GIB}"), ("memory.current", f"{GIB // 2}"), ("memory.stat", ""),
                       ("cpu.max", "50000 100000")):  # fmt: skip
        (group / name).write_text(text)
    memory, cpu = machine.check_memory(tmp_path)
    assert (memory.level, cpu.level) == ("warn", "warn")
    assert_has_all(memory.text, "0.5 GiB free of the 1.0 GiB that a control group allows")
    assert "the time of 0.5" in cpu.text


def test_folders_are_tried(tmp_path: Path) -> None:
    environ = {"MGPU_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path), "MGPU_RUNTIME_DIR": str(tmp_path / "r")}
    found = {each.check: each for each in machine.check_folders(environ)}
    assert set(found) == {"cache", "hub cache", "runtime folder"}
    assert found["runtime folder"].level == "ok"
    assert list((tmp_path / "r").glob("*")) == []


def test_a_runtime_folder_that_cannot_be_made_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = {"MGPU_CACHE": str(tmp_path / "file" / "cache"), "MGPU_RUNTIME_DIR": str(tmp_path / "file" / "r")}
    found = {each.check: each for each in machine.check_folders(environ)}
    assert found["runtime folder"].level == "FAIL"
    assert "MGPU_RUNTIME_DIR=" in found["runtime folder"].advice
    assert found["cache"].level == "warn"
    assert "MGPU_CACHE=" in found["cache"].advice


def test_software_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {each.level for each in machine.check_software()} <= {"ok", "warn"}
    monkeypatch.setattr(machine, "installed", lambda name: "not installed")
    found = list(machine.check_software())
    assert [each.level for each in found] == ["ok", "FAIL", "warn", "warn"]
    assert "pip install gguf" in [each.advice for each in found]


@pytest.mark.parametrize("status", [200, 302, 401, 429, 500])
def test_a_hub_that_answers_is_well_whatever_it_says(status: int) -> None:
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        found = check_hub({"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}/"}, offline=False)
        thread.join(20)
    assert found.level == "ok", found


def test_a_hub_that_is_away_or_silent_is_a_warning() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert check_hub({"HF_ENDPOINT": address}, False, timeout_s=0.2).level == "warn"
    found = check_hub({"HF_ENDPOINT": address}, offline=False)
    assert (found.level, "HTTPS_PROXY" in found.advice) == ("warn", True)
    assert check_hub({"HF_ENDPOINT": "no address"}, offline=False).level == "warn"


@pytest.mark.parametrize(("environ", "offline"), [({}, True), ({"HF_HUB_OFFLINE": "1"}, False)])
def test_the_hub_is_not_asked_offline(environ: dict[str, str], offline: bool) -> None:
    found = check_hub({"HF_ENDPOINT": "http://127.0.0.1:9", **environ}, offline)
    assert (found.level, "not tried" in found.text) == ("ok", True)


def test_findings_fit_80_columns() -> None:
    for finding in (ok("a", "x" * 300), warn("shared memory", "word " * 60, "advice " * 40), fail("b", "", "")):
        assert max(map(len, finding_text(finding).splitlines())) <= WIDTH == 80
