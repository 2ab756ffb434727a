"""A whole server as a stranger sees it: which sockets it has, who gets in, and what SIGHUP changes."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.waiting import eventually
from mgpu import Client
from mgpu.launch.server_process import ServerDied, ServerProcess
from mgpu.protocol.errors import RequestFailed, ServerUnreachable

WORKERS = 2
DEADLINE_S = 60.0


def mgpu_launch(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mgpu.launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


def make_keys(folder: Path, *clients: str) -> Path:
    assert mgpu_launch("keygen", "--out", str(folder)).returncode == 0
    for name in clients:
        assert mgpu_launch("keygen", "--out", str(folder), "--client", name).returncode == 0
    return folder


def start(model: str, *arguments: str) -> ServerProcess:
    options = ("--device", "cpu", "--workers", str(WORKERS))
    return ServerProcess("-m", model, *options, *arguments)


def family_of(server: ServerProcess) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def listening_endpoints(family: list[psutil.Process]) -> list[str]:
    """List every tcp socket that listens and every udp socket there is."""
    found: list[str] = []
    for process in family:
        for each in process.net_connections("inet"):
            if each.type == 2 or each.status == psutil.CONN_LISTEN:  # SOCK_DGRAM
                found.append(f"tcp://{each.laddr.ip}:{each.laddr.port}" if each.type == 1 else f"udp {each.laddr}")
    return found


def socket_inodes(process: psutil.Process) -> set[str]:
    links = (fd.readlink().name for fd in Path(f"/proc/{process.pid}/fd").iterdir() if fd.is_symlink())
    return {name[len("socket:[") : -1] for name in links if name.startswith("socket:[")}


def unix_names(family: list[psutil.Process]) -> set[str]:
    """List the names of all bound unix sockets of these processes; abstract ones begin with @."""
    inodes = set().union(*map(socket_inodes, family))
    rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {row[7] for row in rows if len(row) == 8 and row[6] in inodes}


def assert_private(names: set[str], base: Path) -> None:
    assert names
    for name in names:
        folder = Path(name).parent
        assert folder.parent == base, f"{name} is outside the runtime folder"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert Path(name).stat().st_mode & 0o077 == 0


def wait_for_line(server: ServerProcess, words: str) -> None:
    eventually(lambda: words in server.output(), server.output)


def test_the_default_server_has_private_unix_sockets_and_nothing_else(text_model: str) -> None:
    with start(text_model) as server, Client(server.wait_ready()) as client:
        stream = client.stream("Hello", max_tokens=400, ignore_eos=True)
        next(stream)
        family = family_of(server)
        assert WORKERS + 2 <= len(family) <= WORKERS + 3  # the parent, the gateway, and soon its process for text
        assert listening_endpoints(family) == []
        assert_private(unix_names(family), server.runtime_base)


def test_a_server_with_keys_has_one_tcp_socket_for_listed_keys_which_sighup_changes(
    text_model: str, tmp_path: Path
) -> None:
    keys = make_keys(tmp_path / "keys", "alice", "bob")
    alice, bob = keys / "alice.client", keys / "bob.client"
    with start(text_model, "--bind", "tcp://127.0.0.1:0", "--keys", str(keys)) as server:
        endpoint = server.wait_ready()
        with Client(endpoint, keys=alice) as client:
            stream = client.stream("Hello", max_tokens=30_000, ignore_eos=True)
            next(stream)
            family = family_of(server)
            assert listening_endpoints(family) == [endpoint]
            assert_private(unix_names(family), server.runtime_base)
            assert_no_secret_is_shown(family, keys)
            check_commands(endpoint, alice)

            hidden = alice.read_text()
            public = keys / "clients/alice.public"
            public.rename(keys / "alice.removed")
            public.write_text(hidden)  # the wrong kind of file
            server.process.send_signal(signal.SIGHUP)
            wait_for_line(server, "everything stays as it was")
            next(stream)
            public.unlink()
            server.process.send_signal(signal.SIGHUP)
            with pytest.raises(RequestFailed) as ended:
                list(stream)
            assert ended.value.code == "not_allowed"
        with pytest.raises(ServerUnreachable, match="not on the server's list"):
            Client(endpoint, keys=alice)
        with Client(endpoint, keys=bob) as client:
            assert client.generate("Hello", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        [gateway] = [each for each in family if each.cmdline()[-1] == "mgpu.orchestrator.gateway"]
        gateway.kill()  # the next one must know what the last one was told
        wait_for_line(server, "the gateway is back")
        with pytest.raises(ServerUnreachable, match="not on the server's list"):
            Client(endpoint, keys=alice, connect_timeout_s=DEADLINE_S)
        assert server.stop() == -signal.SIGTERM


def assert_no_secret_is_shown(family: list[psutil.Process], keys: Path) -> None:
    secret = next(line for line in (keys / "server.secret").read_text().splitlines() if line[0] != "#").split()[1]
    for process in family:
        for name in ("cmdline", "environ"):
            assert secret.encode() not in Path(f"/proc/{process.pid}/{name}").read_bytes()


def check_commands(endpoint: str, key_file: Path) -> None:
    told = mgpu_launch("generate", "Hello", "--max-tokens", "2", "--endpoint", endpoint, "--keys", str(key_file))
    assert told.returncode == 0, told.stderr
    asked = mgpu_launch("status", "--endpoint", endpoint, MGPU_KEYS=str(key_file))
    assert asked.returncode == 0, asked.stderr
    without = mgpu_launch("status", "--endpoint", endpoint)
    assert without.returncode == 69
    assert "only clients with a key" in without.stderr
    assert "Traceback" not in without.stderr


def test_beyond_the_loopback_a_server_without_keys_does_not_start(text_model: str, tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", "alice")
    (keys / "server.secret").chmod(0o640)
    for arguments, words in (
        (("--bind", "tcp://*:0"), ("mgpu-launch keygen", "--keys")),
        (("--bind", "tcp://*:0", "--keys", str(tmp_path / "none")), ("mgpu-launch keygen --out",)),
        (("--bind", "tcp://*:0", "--keys", str(keys)), (f"chmod 600 {keys / 'server.secret'}",)),
    ):
        with start(text_model, *arguments) as server:
            with pytest.raises(ServerDied) as ended:
                server.wait_ready(60)
            assert server.process.returncode == 78
        assert all(word in ended.value.output for word in words), ended.value.output
        assert "Traceback" not in ended.value.output
