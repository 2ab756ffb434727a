"""``mgpu-launch roll``: start the copies of `serve --replicas` again, one after the other."""

import os
import time

import click

from mgpu.launch.commands.talk.options import ServerError, server_errors, server_options
from mgpu.launch.pages.help import Command
from mgpu.protocol.client.client import Client
from mgpu.protocol.discovery import find_endpoint, running_servers

LOOK_S = 0.5


@click.command(
    "roll",
    cls=Command,
    short_help="Start all copies of a server again, without refusing a request.",
    examples=("mgpu-launch roll", "mgpu-launch roll --timeout 600"),
)
@server_options
@click.option("--timeout", type=click.FloatRange(1, 86400), default=1800.0, show_default=True, help="Seconds in all.")
def roll_command(endpoint: str | None, keys: str | None, timeout: float) -> None:
    """Start the copies of `serve --replicas` again, one after the other, for example after an upgrade.

    Each copy gets no new requests, finishes those it has, and is replaced; then the next one is.
    """
    from mgpu.orchestrator.router.server import ROLL_SIGNAL

    with server_errors(), Client(endpoint, keys=keys) as client:
        found = find_endpoint(endpoint)
        stats = client.stats()
        if "copies_rolling" not in stats or stats["replicas"] < 1:
            raise ServerError("this server has no copies; start it with: mgpu-launch serve MODEL --replicas 2")
        owner = next((server for server in running_servers() if server.endpoint == found), None)
        if owner is None:
            raise ServerError(f"the server at {found} does not run on this machine; type this command there")
        begun, total = stats["copies_started_again"], int(stats["replicas"])
        os.kill(owner.pid, ROLL_SIGNAL)
        deadline_s = time.monotonic() + timeout
        said = 0
        while time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
            stats = client.stats()
            done = int(stats["copies_started_again"] - begun)
            if done > said:
                click.echo(f"{done} of {total} copies are ready again")
                said = done
            if done >= total and not stats["copies_rolling"]:
                return
        raise ServerError(f"{said} of {total} copies were started again within {timeout:g} s; see the server's log")
