"""``mgpu-launch status``: the state of the running server, with an exit status for probes."""

import json
from dataclasses import asdict

import click

from mgpu.launch.commands.talk import ServerError, server_errors
from mgpu.protocol.client.client import Client


@click.command("status")
@click.option("--endpoint", help="Server to ask (default: MGPU_ENDPOINT, else the one on this machine).")
@click.option("--keys", help="This client's key file, for a server that wants one (default: MGPU_KEYS).")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status_command(endpoint: str | None, keys: str | None, as_json: bool) -> None:
    """Show the state of the running server. Exit status 0 when it is ready, 69 otherwise."""
    with server_errors(), Client(endpoint, keys=keys) as client:
        health, stats, models = client.health(), client.stats(), client.models()
    facts = asdict(health)
    if as_json:
        click.echo(json.dumps({"health": facts, "stats": stats, "models": models}, indent=2))
    else:
        click.echo("\n".join(f"{name:<24} {value}" for name, value in facts.items() if name not in ("id", "layout")))
        click.echo("\n".join(f"{name:<24} {value:,.6g}" for name, value in stats.items() if name not in facts))
    if health.state != "ready":
        raise ServerError(f"the server is {health.state}, not ready")
