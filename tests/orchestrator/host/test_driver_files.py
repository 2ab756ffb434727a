"""What NVIDIA's driver leaves in /dev/shm goes with the workers that it belongs to, and nothing else does."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.orchestrator.host import driver_files
from mgpu.orchestrator.host.driver_files import RECORD_NAME, read_records, remove_driver_files, write_record
from mgpu.orchestrator.host.runtime_dir import RuntimeDir


@pytest.fixture
def ended() -> int:
    """Return the id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


@pytest.fixture
def living() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(driver_files, "SHARED_MEMORY", folder)
    return folder


def file_of(folder: Path, process_id: int, user: int | None = None) -> Path:
    path = folder / f"cuda.shm.{os.geteuid() if user is None else user}.{process_id:x}.1"
    path.touch()
    return path


def test_files_of_a_process_that_has_ended_are_removed_and_no_others(shared: Path, ended: int) -> None:
    mine, other = file_of(shared, ended), file_of(shared, ended + 1)
    others = [other, file_of(shared, ended, os.geteuid() + 1), shared / f"cuda.shm.{os.geteuid()}.{ended:x}0.1"]
    others.append(shared / f"nccl.{ended:x}.1")
    for each in others:
        each.touch()
    assert remove_driver_files([ended]) == [mine.name]
    assert sorted(shared.iterdir()) == sorted(others)
    assert remove_driver_files([ended]) == []


def test_a_process_that_still_ends_is_waited_for(shared: Path, living: subprocess.Popen[bytes]) -> None:
    file = file_of(shared, living.pid)
    assert remove_driver_files([living.pid]) == []  # its number may be that of somebody else's process by now
    assert file.exists()
    living.kill()
    assert remove_driver_files([living.pid], wait_s=20.0) == [file.name]


def test_a_record_counts_in_its_own_namespace_only(tmp_path: Path) -> None:
    copy = tmp_path / "copy0" / "01234567"
    copy.mkdir(parents=True)
    write_record(tmp_path, {12, 7})
    write_record(copy, {9})
    assert sorted(read_records(tmp_path)) == [7, 9, 12]
    (tmp_path / RECORD_NAME).write_text("1 12\nnonsense\n\n")
    assert read_records(tmp_path) == [9]
    (copy / RECORD_NAME).write_bytes(b"\xff\x00")
    assert read_records(tmp_path / "nowhere") == read_records(tmp_path) == []
    write_record(tmp_path / "nowhere", {1})


def test_a_folder_that_another_start_removes_meanwhile_ends_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("copy0", "copy1"):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, {7})
    listed, list_folder = [], os.scandir

    def scandir(folder: str) -> object:
        listed.append(folder)
        if len(listed) == 2:  # the folders in this one are known by now
            shutil.rmtree(folder)
        return list_folder(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert read_records(tmp_path) == [7]


def test_the_parent_and_the_next_start_clean_up(shared: Path, tmp_path: Path, ended: int) -> None:
    environ = {"MGPU_RUNTIME_DIR": str(tmp_path / "run")}
    with RuntimeDir(environ) as runtime:
        runtime.add_worker(ended)
        runtime.add_worker(os.getpid())
        assert sorted(read_records(runtime.path)) == sorted([ended, os.getpid()])
        file_of(shared, ended)
        runtime.remove_workers([ended])
        assert not list(shared.iterdir())
        assert read_records(runtime.path) == [os.getpid()]
    left = tmp_path / "run" / "01234567"  # of a server that was killed with all its processes
    left.mkdir()
    write_record(left, {ended})
    file_of(shared, ended)
    RuntimeDir(environ).close()
    assert not left.exists()
    assert not list(shared.iterdir())
