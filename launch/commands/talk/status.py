"""``mgpu-launch status``: the state of the running server, with an exit status for probes."""

import json
from dataclasses import asdict

import click

from mgpu.launch.commands.talk.options import NO_MODEL, ServerError, server_errors, server_options
from mgpu.launch.pages.help import Command
from mgpu.launch.pages.status import ask, counters, page
from mgpu.protocol.client.client import Client


@click.command(
    "status",
    cls=Command,
    no_argument=NO_MODEL,
    short_help="Show state, speed and memory of a server.",
    examples=(
        "mgpu-launch status",
        "mgpu-launch status --json | jq .stats.tokens_per_s",
    ),
)
@server_options
@click.option("--stats", "with_stats", is_flag=True, help="Print every counter too.")
@click.option("--json", "as_json", is_flag=True, help="Print state, counters and models as JSON.")
def status_command(endpoint: str | None, keys: str | None, with_stats: bool, as_json: bool) -> None:
    """Show the state of the running server: speed, requests, KV cache and GPU memory.

    The exit status is 0 when the server is ready, 69 otherwise.
    """
    with server_errors(), Client(endpoint, keys=keys) as client:
        status = ask(client)
        models = client.models() if as_json else []
    if as_json:
        click.echo(json.dumps({"health": asdict(status.health), "stats": status.stats, "models": models}, indent=2))
    else:
        click.echo(page(status))
        if with_stats:
            click.echo(f"\n{counters(status)}")
    if status.health.state != "ready":
        raise ServerError(f"the server is {status.health.state}, not ready")
