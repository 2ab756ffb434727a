"""``mgpu-launch route``: one front endpoint, and HTTP, for several servers that run already."""

import os
from pathlib import Path
from typing import Any

import click

from mgpu.launch.completion import complete_endpoint, complete_file, complete_folder
from mgpu.launch.pages.help import Command, GroupedOption
from mgpu.launch.prepare.http import http_address, http_options
from mgpu.launch.prepare.preflight import keys_for
from mgpu.launch.settings.options import http_flags, read_config
from mgpu.launch.settings.values import ConfigError
from mgpu.protocol.keys import KeyFileError, read_client_keys

_GROUP = "Router"


@click.command(
    "route",
    cls=Command,
    short_help="Serve several running servers behind one endpoint.",
    examples=(
        "mgpu-launch route --replica ipc:///run/a.sock --replica ipc:///run/b.sock",
        "mgpu-launch route --replica-file servers.txt --bind tcp://*:5555 --keys keys/",
        "mgpu-launch route --replica dns://mgpu.prod.svc:5555 --replica-keys me.client",
    ),
)
@click.option(
    "--replica",
    "replicas",
    cls=GroupedOption,
    group=_GROUP,
    multiple=True,
    metavar="ENDPOINT",
    shell_complete=complete_endpoint,
    help="Endpoint of a server, or dns://NAME:PORT for all addresses of a name; as often as there are servers.",
)
@click.option(
    "--replica-file",
    cls=GroupedOption,
    group=_GROUP,
    type=click.Path(path_type=Path, dir_okay=False),
    shell_complete=complete_file,
    help="File with an endpoint on each line; read again every two seconds.",
)
@click.option(
    "--replica-keys",
    cls=GroupedOption,
    group=_GROUP,
    shell_complete=complete_file,
    help="Key file of this router, for servers on tcp that want one.",
)
@click.option("--bind", cls=GroupedOption, group=_GROUP, default="", help="Front endpoint, as that of serve.")
@click.option(
    "--keys", cls=GroupedOption, group=_GROUP, default="", shell_complete=complete_folder, help="As that of serve."
)
@click.option(
    "--drain-timeout",
    cls=GroupedOption,
    group=_GROUP,
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    help="Seconds that running requests get after SIGTERM.",
)
@http_flags
def route_command(
    replicas: tuple[str, ...],
    replica_file: Path | None,
    replica_keys: str | None,
    bind: str,
    keys: str,
    drain_timeout: float,
    **flags: Any,
) -> None:
    """Serve several running servers behind one endpoint, until Ctrl-C or SIGTERM.

    A request goes where its prompt begins like one before, else where least waits. Requests of a server that dies go on
    at another one.
    """
    config, origins = read_config(None, flags)
    from mgpu.orchestrator.router.discovery import Discovery

    discovery = Discovery(replicas, replica_file)
    options = http_options(config)
    server_keys = keys_for(bind, keys)
    if replica_keys is not None:
        try:
            read_client_keys(replica_keys)
        except KeyFileError as error:
            raise ConfigError(f"--replica-keys: {error}") from None
    from mgpu.launch.commands.serve import allow_open_files, begin_log
    from mgpu.orchestrator.gateway.front.endpoint import try_endpoint
    from mgpu.orchestrator.host.listening import listening
    from mgpu.orchestrator.host.signals import end_process
    from mgpu.orchestrator.host.systemd import Notifier
    from mgpu.orchestrator.router.server import RouterConfig, RouterServer

    notifier = Notifier.from_environment(os.environ)
    allow_open_files()
    if bind:
        try_endpoint(bind, server_keys is not None)
    begin_log(config, "router")
    for_all_users = config.http_no_auth or options.api_keys is not None
    with listening(http_address(config, origins["http"] != "default"), for_all_users) as listener:
        described = RouterConfig(
            bind, server_keys, options, drain_timeout, endpoints=discovery.endpoints, replica_keys=replica_keys
        )
        status = RouterServer(described, notifier, listener).run()
    end_process(status)
