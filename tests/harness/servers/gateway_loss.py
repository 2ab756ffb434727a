"""Lose the gateway of a running server, and find the one that takes its place."""

import sys
from array import array
from pathlib import Path

import psutil

from harness.servers.server_process import DEADLINE_S, ServerProcess
from harness.waiting import eventually
from mgpu.protocol.discovery import running_servers
from mgpu.protocol.internal.gateway_messages import Resumable, Submit
from mgpu.protocol.internal.worker_messages import RowSampling

REAL_GATEWAY = (sys.executable, "-m", "mgpu.orchestrator.gateway")
SESSION = "0123456789abcdef"


def resumable(request_id: int, prompt: list[int], max_tokens: int) -> Resumable:
    submit = Submit(request_id, array("i", prompt).tobytes(), max_tokens, [], RowSampling(), b"", 0)
    return Resumable(SESSION, request_id, b"context", [submit])


def lose_the_gateway(server: ServerProcess, order: bytes = b"die") -> None:
    """Let it end, and wait until the next one is told that all is well."""
    known = len(server.infos)
    server.socket.send(order)
    server.wait_for(lambda: [info.state for info in server.infos[known:]] == ["ready"])


def gateway_of(server: ServerProcess) -> psutil.Process:
    [found] = server.children_like("mgpu.orchestrator.gateway")
    return found


def endpoint_of(server: ServerProcess, folder: Path) -> str:
    """Wait for a server with the real gateway."""
    environ = {"MGPU_RUNTIME_DIR": str(folder / "run")}
    eventually(lambda: running_servers(environ) or server.process.poll() is not None, lambda: server.log, DEADLINE_S)
    assert server.process.poll() is None, server.log
    return running_servers(environ)[0].endpoint
