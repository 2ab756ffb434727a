"""``mgpu-launch http``: an HTTP server of its own, in front of a server that runs elsewhere or has none."""

import asyncio
import os
import signal
from typing import Any

import click

from mgpu.launch.commands.talk.options import server_options
from mgpu.launch.pages.help import Command
from mgpu.launch.prepare.http import http_address, http_options
from mgpu.launch.settings.options import http_flags, read_config
from mgpu.launch.settings.values import ConfigError


@click.command(
    "http",
    cls=Command,
    short_help="Serve OpenAI-compatible HTTP for a running server.",
    examples=(
        "mgpu-launch http  # for the server on this machine",
        "mgpu-launch http --endpoint tcp://10.0.0.5:5555 --keys me.client",
    ),
)
@server_options
@http_flags
def http_command(endpoint: str | None, keys: str | None, **flags: Any) -> None:
    """Serve OpenAI-compatible HTTP for a running server, until Ctrl-C or SIGTERM.

    `serve` does so by itself; any number of these may run beside it, also on other machines.
    """
    config, _ = read_config(None, flags)
    options, address = http_options(config), http_address(config, is_typed=True)
    if address is None:
        raise ConfigError("--http none: there is nothing to do; name an address")
    from mgpu.launch.commands.serve import begin_log
    from mgpu.orchestrator.host.listening import HttpListener, listening
    from mgpu.orchestrator.host.signals import end_process
    from mgpu.orchestrator.http.edge.guard import ApiKeys
    from mgpu.orchestrator.http.server import allow_many_connections, front_client, new_event_loop, serve

    begin_log(config, "http")
    allow_many_connections()
    received: list[int] = []
    wake_fd, wake_by = os.pipe()

    def collect(number: int, _frame: object) -> None:
        received.append(number)
        os.write(wake_by, b"x")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, collect)

    def run(listener: HttpListener) -> None:
        client = front_client(endpoint, keys)
        api_keys = ApiKeys(options.api_keys)
        watched = {wake_fd: lambda: True}
        served = serve(
            listener.socket,
            client,
            options,
            address.is_loopback_port,
            api_keys,
            watched,
            lambda: click.echo(f"HTTP (OpenAI-compatible) on {listener.url}", err=True),
            names_accounts=keys is None,
        )
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(served)

    with listening(address, config.http_no_auth or options.api_keys is not None) as listener:
        assert listener is not None
        run(listener)
    end_process(-received[0] if received else 1)
