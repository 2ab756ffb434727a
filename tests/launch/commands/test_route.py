"""`mgpu-launch route`: several servers behind one endpoint, and what it refuses."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder
from harness.waiting import eventually
from mgpu import Client
from mgpu.protocol.discovery import BASE_VARIABLE, running_servers
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.keys import fingerprint, key_text, new_pair


def route(*arguments: str, environ: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "mgpu.launch.cli", "route", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environ or {})})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "no servers: name each with --replica ENDPOINT"),
        (("--replica", "localhost:5555"), "no endpoint of a server; write ipc:///PATH, tcp://ADDRESS:PORT or dns://"),
        (
            ("--replica", "tcp://127.0.0.1:5", "--replica-keys", "/nowhere/me.client"),
            "--replica-keys: cannot read the key file /nowhere",
        ),
        (("--replica", "ipc:///a", "--replica", "ipc:///a"), "ipc:///a is named twice"),
        (("--replica-file", "/nowhere/list"), "cannot be read"),
        (("--replica", "ipc:///a", "--bind", "tcp://0.0.0.0:5555"), "keys"),
    ],
)
def test_mistakes_are_refused_with_the_way_out(arguments: tuple[str, ...], problem: str) -> None:
    with route(*arguments) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode in (1, 64, 78)
    assert problem in error
    assert "Traceback" not in error


def test_a_router_whose_servers_are_missing_says_so_and_ends_when_told(tmp_path: Path) -> None:
    base = {BASE_VARIABLE: str(tmp_path / "run")}
    with route("--replica", f"ipc://{tmp_path}/nobody", "--http", "none", environ=base) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "takes requests" in line)
        process.terminate()
        assert process.wait(30) == -15
    assert f"none of 1 servers takes requests; waiting for the first (replica0, ipc://{tmp_path}/nobody: unre" in line
    assert "--replica-file" in line
    assert not running_servers(base)


def test_a_list_of_servers_is_read_again(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path)
    listed, base = tmp_path / "servers.txt", {BASE_VARIABLE: str(tmp_path / "run")}
    with GatewayProcess(model) as first, GatewayProcess(model) as second:
        listed.write_text(f"{first.endpoint}  # the first\n")
        with route("--replica-file", str(listed), "--http", "none", environ=base) as process:
            try:
                eventually(lambda: bool(running_servers(base)), "it is not ready")
                with Client(running_servers(base)[0].endpoint) as client:
                    assert client.generate([5], max_tokens=2).token_ids == (5, 5)
                    listed.write_text(f"{second.endpoint}\n")
                    eventually(lambda: "gets no new requests" in client.health().layout, client.health)
                    eventually(lambda: client.stats()["replicas_ready"] == 1, client.stats)
                    assert client.generate([6], max_tokens=2).token_ids == (6, 6)
                assert [len(each.engine.submits) for each in (first, second)] == [1, 1]
                process.terminate()
                assert process.wait(30) == -15
                assert not running_servers(base)
            finally:
                process.kill()


def key_file(folder: Path, name: str, secret: bytes, server: bytes) -> Path:
    path = folder / f"{name}.client"
    path.touch(0o600)
    path.write_text(f"secret {key_text(secret)}\nserver {key_text(server)}\n")
    return path


def test_servers_on_tcp_with_keys_are_found_by_address_and_name(tmp_path: Path) -> None:
    """One does not list the router's key: the router says so, and goes on with the others."""
    server_public, server_secret = new_pair()
    (public, secret), stranger = new_pair(), new_pair()
    file = key_file(tmp_path, "router", secret, server_public)
    others_file = key_file(tmp_path, "stranger", stranger[1], server_public)
    model, base = make_model_folder(tmp_path), {BASE_VARIABLE: str(tmp_path / "run")}
    clients = [(public, file), (stranger[0], others_file)]
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                GatewayProcess(model, bind="tcp://127.0.0.1:0", keys=ServerKeys(server_secret, [key]), client_keys=path)
            )
            for key, path in clients
        ]
        port = servers[0].endpoint.rpartition(":")[2]
        named = ["--replica", f"dns://localhost:{port}", "--replica", servers[1].endpoint]
        process = stack.enter_context(route(*named, "--replica-keys", str(file), "--http", "none", environ=base))
        stack.callback(process.kill)
        eventually(lambda: bool(running_servers(base)), "it is not ready")
        client = stack.enter_context(Client(running_servers(base)[0].endpoint))
        eventually(lambda: client.stats()["replicas_ready"] == 1, client.stats)
        refused = f"refuses this client's key {fingerprint(public)}: it is not on the server's list"
        eventually(lambda: refused in client.health().layout, client.health)
        assert client.generate([5], max_tokens=3).token_ids == (5, 5, 5)
        assert [len(each.engine.submits) for each in servers] == [1, 0]
