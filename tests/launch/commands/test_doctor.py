"""`mgpu-launch doctor` as people type it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgpu.launch import cli
from mgpu.launch.commands import doctor
from mgpu.launch.doctor.finding import Finding, fail, ok, warn
from mgpu.launch.doctor.machine import check_folders


def run(*options: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "mgpu.launch.cli", "doctor", "--offline", *options], env={**os.environ, **environ},
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def test_a_machine_without_gpus_is_checked_too() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    for check in ("memory", "open files", "processes", "shared memory", "runtime folder", "torch", "gloo"):
        assert f" {check} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_failure_ends_with_1_and_has_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    environ = {"MGPU_RUNTIME_DIR": str(tmp_path / "file" / "folder")}
    monkeypatch.setattr(doctor, "examine", lambda offline, timeout: check_folders(environ))
    monkeypatch.setattr(sys, "argv", ["mgpu-launch", "doctor", "--offline", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    failed = [each for each in json.loads(capsys.readouterr().out) if each["level"] == "FAIL"]
    assert [each["check"] for each in failed] == ["runtime folder"]
    assert "MGPU_RUNTIME_DIR=" in failed[0]["advice"]


@pytest.mark.parametrize(("found", "counts"), [
    ([ok("a", "b")], "1 check: 1 ok, 0 warnings, 0 failures"),
    ([ok("a", "b"), warn("c", "d", "e")], "2 checks: 1 ok, 1 warning, 0 failures"),
    ([fail("a", "b", "c"), ok("d", "e")], "2 checks: 1 ok, 0 warnings, 1 failure"),
])  # fmt: skip
def test_only_a_failure_changes_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: list[Finding], counts: str
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda offline, timeout: iter(found))
    assert doctor.doctor_command.main(["--offline"], standalone_mode=False) == ("1 failure" in counts)
    assert counts in capsys.readouterr().out
