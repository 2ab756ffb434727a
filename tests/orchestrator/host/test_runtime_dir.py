"""The private folder of a server, and how others find it."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import zmq

from mgpu.orchestrator.host.runtime_dir import RuntimeDir, RuntimeDirError, _made, sweep
from mgpu.protocol.discovery import (
    INFO_NAME,
    IPC_PATH_MAX,
    LOCK_NAME,
    RunningServer,
    base_dirs,
    find_endpoint,
    is_locked,
    running_servers,
    write_server,
)
from mgpu.protocol.errors import ServerUnreachable

SERVER = RunningServer("ipc:///x/front.sock", 1234, "tiny", "0.1.0")


@pytest.fixture
def base() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mgpu"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def environ(base: Path) -> dict[str, str]:
    return {"MGPU_RUNTIME_DIR": str(base)}


def test_folder_is_private_locked_and_gone_after_close(base: Path) -> None:
    runtime = RuntimeDir(environ(base))
    assert stat.S_IMODE(runtime.path.lstat().st_mode) == 0o700
    assert is_locked(runtime.path)
    assert runtime.ipc("link") == f"ipc://{runtime.path}/link"
    runtime.close()
    runtime.close()
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("name", ["link", "x" * 200])
def test_files_that_are_made_after_a_socket_have_the_users_own_modes(base: Path, name: str) -> None:
    runtime, context = RuntimeDir(environ(base)), zmq.Context[zmq.Socket[bytes]]()
    socket = context.socket(zmq.PAIR)
    before = os.umask(0o022)
    try:
        with contextlib.suppress(RuntimeDirError):
            runtime.bind(socket, name)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
        socket.close(linger=0)
        context.term()
        runtime.close()


def test_servers_do_not_share_a_folder(base: Path) -> None:
    first, second = RuntimeDir(environ(base)), RuntimeDir(environ(base))
    assert first.path != second.path
    assert first.path.exists(), "the start of the second did not sweep the first away"
    first.close()
    second.close()


def test_folders_of_dead_servers_are_swept_by_the_next_start(base: Path) -> None:
    code = "import os; from mgpu.orchestrator.host.runtime_dir import RuntimeDir; RuntimeDir(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environ(base)}, check=True, timeout=30)
    (stale,) = base.iterdir()
    assert not is_locked(stale)
    runtime = RuntimeDir(environ(base))
    assert not stale.exists()
    runtime.close()


def test_sweep_leaves_other_files_alone(base: Path) -> None:
    (base / "notes").mkdir()
    (base / "0123abcd").symlink_to(base / "notes")
    assert sweep(base) == []
    assert (base / "notes").exists()


def test_ready_servers_are_found_with_the_most_recent_first(base: Path) -> None:
    first, second = RuntimeDir(environ(base)), RuntimeDir(environ(base))
    assert running_servers(environ(base)) == []
    for runtime, at_s, name in ((first, 1000, "old"), (second, 2000, "new")):
        write_server(runtime.path, RunningServer("ipc:///x", 1, name, "0"))
        os.utime(runtime.path / INFO_NAME, (at_s, at_s))
    assert [server.model for server in running_servers(environ(base))] == ["new", "old"]
    second.close()
    assert [server.model for server in running_servers(environ(base))] == ["old"]
    first.close()


def test_a_server_file_without_a_live_server_is_not_found(base: Path) -> None:
    folder = base / "0123abcd"
    folder.mkdir(mode=0o700)
    write_server(folder, SERVER)
    assert running_servers(environ(base)) == []
    (folder / "lock").touch()
    assert running_servers(environ(base)) == []


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"pid": "1", "endpoint": "x", "model": "m", "version": "0"}', "\xff"]
)
def test_a_broken_server_file_is_skipped(base: Path, text: str) -> None:
    runtime = RuntimeDir(environ(base))
    (runtime.path / INFO_NAME).write_bytes(text.encode("latin-1"))
    assert running_servers(environ(base)) == []
    runtime.close()


def test_too_long_a_path_is_an_error_with_the_numbers(base: Path) -> None:
    long = base / ("x" * 100)
    with pytest.raises(RuntimeDirError, match=rf"bytes, the system allows {IPC_PATH_MAX}.*Set MGPU_RUNTIME_DIR="):
        RuntimeDir(environ(long))


def test_a_folder_that_others_may_write_to_is_refused(base: Path) -> None:
    base.chmod(0o777)
    with pytest.raises(RuntimeDirError, match="others may write to it"):
        RuntimeDir(environ(base))


def test_a_link_in_place_of_the_folder_is_refused(base: Path) -> None:
    link = base / "link"
    link.symlink_to(base)
    with pytest.raises(RuntimeDirError, match="not a folder"):
        RuntimeDir(environ(link))


def test_a_file_in_place_of_the_folder_is_refused(base: Path) -> None:
    (base / "file").touch()
    with pytest.raises(RuntimeDirError, match="File exists"):
        RuntimeDir(environ(base / "file"))


class FullSocket:
    def bind(self, endpoint: str) -> None:
        raise zmq.ZMQError(errno.ENOSPC)


def test_a_full_file_system_may_pass_and_is_no_mistake_of_the_configuration(base: Path) -> None:
    runtime = RuntimeDir(environ(base))
    with pytest.raises(RuntimeDirError, match=f"{runtime.path}: its file system is full") as caught:
        runtime.bind(cast("zmq.Socket[bytes]", FullSocket()), "link")
    assert caught.value.exit_code == 69
    runtime.close()


@pytest.mark.parametrize("step", ["mkdir", "rename"])
def test_a_folder_that_cannot_be_made_is_told_and_leaves_no_descriptor(
    base: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patched:
        patched.setattr(Path, step, fail)
        with pytest.raises(RuntimeDirError, match="its file system is full"):
            _made(base / "00000001")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert list(base.iterdir()) == []


def lose_all(folder: Path) -> None:
    shutil.rmtree(folder)


def lose_the_lock(folder: Path) -> None:
    (folder / LOCK_NAME).unlink()


def lose_it_to_another(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / LOCK_NAME).touch()


def lose_the_base(folder: Path) -> None:
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("lose", [lose_all, lose_the_lock, lose_the_base])
def test_a_folder_that_was_removed_is_made_again(
    base: Path, lose: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgpu.orchestrator.host.runtime_dir.CHECK_INTERVAL_S", 0.0)
    runtime = RuntimeDir(environ(base))
    runtime.announce(SERVER)
    lose(runtime.path)
    assert running_servers(environ(base)) == []
    runtime.restore_if_removed()
    assert running_servers(environ(base)) == [SERVER]
    assert stat.S_IMODE(runtime.path.lstat().st_mode) == 0o700
    assert list(base.iterdir()) == [runtime.path]
    runtime.close()
    assert list(base.iterdir()) == []


def lose_it_for_good(folder: Path) -> None:
    shutil.rmtree(folder.parent)
    folder.parent.touch()


@pytest.mark.parametrize("lose", [lose_it_for_good, lose_it_to_another])
def test_a_loss_of_the_folder_that_cannot_be_mended_is_told_once(
    base: Path, lose: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mgpu.orchestrator.host.runtime_dir.CHECK_INTERVAL_S", 0.0)
    runtime = RuntimeDir(environ(base / "base"))
    runtime.restore_if_removed()
    assert not caplog.records
    lose(runtime.path)
    runtime.restore_if_removed()
    runtime.restore_if_removed()
    assert [f"removed {runtime.path}, the folder" in record.message for record in caplog.records] == [True]
    runtime.close()


def test_bases_follow_the_session_and_the_service_manager() -> None:
    name = f"mgpu-{os.geteuid()}"
    temporary = [Path("/tmp") / name, Path("/var/tmp") / name]
    assert base_dirs({"MGPU_RUNTIME_DIR": "/a", "XDG_RUNTIME_DIR": "/b"}) == [Path("/a")]
    assert base_dirs({"RUNTIME_DIRECTORY": "/run/x", "XDG_RUNTIME_DIR": "/b"}) == [
        Path("/run/x"), Path("/b/mgpu"), Path("/run/mgpu"), *temporary,
    ]  # fmt: skip
    assert base_dirs({}) == [Path("/run/mgpu"), *temporary]
    assert base_dirs({"TMPDIR": "/scratch", "TMP": "/tmp"}) == [Path("/run/mgpu"), Path("/scratch") / name, *temporary]


def test_a_relative_base_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("MGPU_RUNTIME_DIR", "RUNTIME_DIRECTORY", "TMPDIR"):
        assert all(base.is_absolute() for base in base_dirs({variable: "here"}))
    assert base_dirs({"MGPU_RUNTIME_DIR": "here"}) == [tmp_path / "here"]


def test_looking_for_a_server_writes_no_file(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "_get_default_tempdir", refuse)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("MGPU_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    with RuntimeDir() as runtime:
        runtime.announce(SERVER)
        assert SERVER in running_servers()


def test_a_server_that_is_not_found_was_looked_for_in_named_folders(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MGPU_ENDPOINT", raising=False)
    monkeypatch.setenv("MGPU_RUNTIME_DIR", str(base))
    with pytest.raises(ServerUnreachable, match=f"looked in {base}.*TMPDIR.*MGPU_RUNTIME_DIR.*MGPU_ENDPOINT"):
        find_endpoint(None)


def test_a_server_is_found_by_its_model(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGPU_RUNTIME_DIR", str(base))
    monkeypatch.delenv("MGPU_ENDPOINT", raising=False)
    with pytest.raises(ServerUnreachable, match=r"'small' is no endpoint, .*no server is running"):
        find_endpoint("small")
    with RuntimeDir() as one, RuntimeDir() as two, RuntimeDir() as three:
        for runtime, endpoint, model in (
            (one, "ipc:///1", "small"),
            (two, "ipc:///2", "large"),
            (three, "ipc:///3", "large"),
        ):
            runtime.announce(replace(SERVER, endpoint=endpoint, model=model))
        assert find_endpoint("small") == "ipc:///1"
        monkeypatch.setenv("MGPU_ENDPOINT", "small")
        assert find_endpoint(None) == "ipc:///1"
        monkeypatch.delenv("MGPU_ENDPOINT")
        for asked, words in (("large", "several servers here serve 'large'"), (None, "--endpoint or MGPU_ENDPOINT"),
                             ("other", "no model of a server here .*small")):  # fmt: skip
            with pytest.raises(ServerUnreachable, match=words):
                find_endpoint(asked)
        assert find_endpoint("tcp://127.0.0.1:5") == "tcp://127.0.0.1:5"


def test_no_usable_folder_is_one_line_that_names_each_and_what_to_type(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(RuntimeDirError) as caught:
        RuntimeDir({"MGPU_RUNTIME_DIR": str(taken)})
    text = str(caught.value)
    assert str(taken) in text
    assert "Set MGPU_RUNTIME_DIR=/" in text
    assert "\n" not in text


def test_a_server_that_ends_while_it_is_looked_for_is_not_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RuntimeDir(environ(base))
    runtime.announce(SERVER)

    def locked_and_then_gone(folder: Path) -> bool:
        shutil.rmtree(folder)
        return True

    monkeypatch.setattr("mgpu.protocol.discovery.is_locked", locked_and_then_gone)
    assert running_servers(environ(base)) == []
    runtime.close()
