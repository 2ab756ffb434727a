"""A running server whose folder is removed, or whose file system is full: never a mistake of the configuration."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.servers.server_process import ServerProcess, ready_server
from harness.waiting import eventually
from mgpu.protocol.discovery import BASE_VARIABLE, running_servers

MOUNT = 'mount -t tmpfs -o size=1m,nr_inodes=100,mode=0700 none "$MGPU_RUNTIME_DIR" && exec "$@"'
"""Its own file system for the server alone, which ends with it."""
OWN_MOUNT = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh")


def kill_worker(server: ServerProcess) -> None:
    server.workers()[0].kill()


def kill_gateway(server: ServerProcess) -> None:
    server.socket.send(b"die")


@pytest.mark.parametrize("kill", [kill_worker, kill_gateway])
def test_a_recovery_makes_a_removed_folder_again(folder: Path, kill: Callable[[ServerProcess], None]) -> None:
    with ready_server(folder, {"step_s": 0.001}) as server:
        server.begin(1, [1, 2, 3], 240)
        server.counters()  # it serves: the folder has its last file
        shutil.rmtree(folder / "run")
        server.infos.clear()
        kill(server)
        server.wait_ready()
        server.serve(2, [1, 2, 3], 5)
        assert server.finish[2] == "length"
        server.wait_for_log("it is there again")
        assert [each.pid for each in running_servers({BASE_VARIABLE: str(folder / "run")})] == [server.process.pid]


@pytest.mark.parametrize("kill", [kill_worker, kill_gateway])
def test_a_recovery_without_a_folder_is_a_failure_that_a_restart_may_help(
    folder: Path, kill: Callable[[ServerProcess], None]
) -> None:
    with ready_server(folder, {"step_s": 0.02}) as server:
        server.begin(1, [1, 2, 3], 240)
        server.counters()
        shutil.rmtree(folder / "run")
        (folder / "run").touch()
        kill(server)
        assert server.wait_exit() == 1
        assert "again, which is gone" in server.log
        assert "Traceback" not in server.log
        if kill is kill_worker:
            assert server.finish == {1: "error"}
            assert "the server failed: cannot make" in server.errors[1]


def test_a_folder_that_cannot_be_made_again_is_told_once_and_who_is_connected_is_served(folder: Path) -> None:
    with ready_server(folder) as server:
        server.counters()  # it serves: who tells that it is ready also has to announce it, in that folder
        shutil.rmtree(folder / "run")
        (folder / "run").touch()
        eventually(lambda: "something has removed" in server.log)
        server.serve(1, [1, 2, 3], 5)
        assert server.finish == {1: "length"}
        assert server.end(signal.SIGTERM) == -signal.SIGTERM
        assert server.log.count("something has removed") == 1


@pytest.fixture
def own_mount(folder: Path) -> tuple[str, ...]:
    (folder / "run").mkdir(mode=0o700)
    environ = {**os.environ, "MGPU_RUNTIME_DIR": str(folder / "run")}
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*OWN_MOUNT, "true"], env=environ, stderr=subprocess.DEVNULL).returncode == 0:
            return OWN_MOUNT
    pytest.skip("this user may not mount a file system in a namespace of its own")


def fill(path: Path) -> None:
    """Leave no byte and no name."""
    with contextlib.suppress(OSError), (path / "big").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    with contextlib.suppress(OSError):
        for number in range(100):
            (path / str(number)).touch()


@pytest.mark.parametrize("kill", [kill_worker, kill_gateway])
def test_a_recovery_on_a_full_file_system_has_the_room_of_the_old_sockets(
    folder: Path, own_mount: tuple[str, ...], kill: Callable[[ServerProcess], None]
) -> None:
    with ready_server(folder, {"step_s": 0.001}, through=own_mount) as server:
        server.serve(1, [1, 2, 3], 2)
        fill(Path(f"/proc/{server.process.pid}/root{folder}/run"))
        server.infos.clear()
        kill(server)
        server.wait_ready()
        server.serve(2, [1, 2, 3], 2)
        assert server.finish[2] == "length"
