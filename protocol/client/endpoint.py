"""Find the server to connect to, and notice that it is gone."""

import os
from pathlib import Path

from mgpu.protocol.discovery import LOCK_NAME, is_locked, running_servers
from mgpu.protocol.errors import ServerUnreachable

ENDPOINT_VARIABLE = "MGPU_ENDPOINT"
START_HINT = "start one with: mgpu-launch serve -m MODEL"


def find_endpoint(endpoint: str | None) -> str:
    """Return the endpoint to use: the argument, else MGPU_ENDPOINT, else that of the only running server.

    ServerUnreachable when no server runs, or when several run and none was named.
    """
    endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE)
    if endpoint:
        return endpoint
    servers = running_servers()
    if not servers:
        raise ServerUnreachable(f"no mgpu server is running here; {START_HINT}, or set {ENDPOINT_VARIABLE}")
    if len(servers) > 1:
        listed = ", ".join(f"{server.endpoint} ({server.model})" for server in servers)
        raise ServerUnreachable(f"several mgpu servers are running: {listed}; choose one with {ENDPOINT_VARIABLE}")
    return servers[0].endpoint


def server_has_ended(endpoint: str) -> bool:
    """Return True if the server behind an ipc endpoint has ended: its folder is gone, or its lock is free."""
    if not endpoint.startswith("ipc://"):
        return False
    folder = Path(endpoint.removeprefix("ipc://")).parent
    return not folder.is_dir() or ((folder / LOCK_NAME).exists() and not is_locked(folder))
