"""``mgpu-launch serve``: place the model, start the workers, serve until a signal."""

import logging
import os
import resource
import shutil
import signal
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from mgpu.launch.pages.help import Command
from mgpu.launch.pages.layout import layout_for
from mgpu.launch.prepare.http import http_address, http_options
from mgpu.launch.prepare.parts import client_limits, part_of
from mgpu.launch.prepare.planned_model import PlannedModel, prepare
from mgpu.launch.prepare.preflight import LEAST_FILES, check_open_files, check_options, keys_for
from mgpu.launch.prepare.replicas import copy_commands, of_one_copy
from mgpu.launch.prepare.several_hosts import serve_hosts
from mgpu.launch.settings.config import ServeConfig, declared_options
from mgpu.launch.settings.options import config_options, model_argument, read_config
from mgpu.launch.settings.values import ConfigError
from mgpu.orchestrator.config import Restarts, ServerConfig, Timeouts
from mgpu.orchestrator.gateway.front.endpoint import try_endpoint
from mgpu.orchestrator.host.listening import HttpListener, listening
from mgpu.orchestrator.host.reload import Reloadable
from mgpu.orchestrator.host.server_keys import describe
from mgpu.orchestrator.host.systemd import Notifier
from mgpu.orchestrator.hosts.hosts import Hosts
from mgpu.orchestrator.placement.machine.devices import Machine, worker_environment
from mgpu.orchestrator.placement.machine.numa import cpus_of_node
from mgpu.orchestrator.router.copies import COPY_VARIABLE
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.internal.process.child import end_with_parent
from mgpu.protocol.internal.process.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging

RELOADED = frozenset({"keys", "http_keys", "drain_timeout_s", *(each.name for each in fields(ClientLimits))})
"""Fields that SIGHUP takes into use."""


@click.command(
    "serve",
    cls=Command,
    examples=(
        "mgpu-launch serve demo                    # a small model, built in",
        "mgpu-launch serve Qwen/Qwen3-0.6B         # downloaded from the hub",
        "mgpu-launch serve ./model --quant 8 --max-seq-len 16k",
        'mgpu-launch serve ./model -n "0:32;1:16"  # layers by hand',
        "mgpu-launch serve ./model --bind tcp://127.0.0.1:5555",
    ),
)
@model_argument
@config_options
def serve_command(config_file: Path | None, **flags: Any) -> None:
    """Serve MODEL (or -m MODEL) until Ctrl-C or SIGTERM.

    Running requests are finished first; a second Ctrl-C stops at once.
    """
    from mgpu.orchestrator.host.signals import end_process
    from mgpu.orchestrator.server import Server

    component = end_with_router(os.environ)
    notifier = Notifier.from_environment(os.environ)
    config, origins = read_config(config_file, flags)
    allow_open_files()
    keys = check_options(config, origins)
    if config.bind:
        try_endpoint(config.bind, keys is not None)
    begin_log(config, component)
    log_security(config, keys)
    http = http_options(config)
    for_all_users = config.http_no_auth or http.api_keys is not None
    with listening(http_address(config, origins["http"] != "default"), for_all_users) as listener:

        def make_server(planned: PlannedModel, hosts: Hosts | None = None) -> Server:
            described = server_config(config, planned, keys)
            if hosts is None and wants_standby(config, origins, planned.plan.machine):
                described = replace(described, restarts=replace(described.restarts, standby=True))
            return Server(described, notifier, lambda: read_again(config, config_file, flags), listener, hosts)

        if config.nodes:
            end_process(serve_hosts(config, make_server))
        if config.replicas > 1:
            end_process(serve_copies(config, origins, keys, notifier, listener))
        status = make_server(prepare(config)).run()
    end_process(status)


def wants_standby(config: ServeConfig, origins: Mapping[str, str], machine: Machine) -> bool:
    """Return whether processes wait for the next epoch: as asked, else where workers use GPUs."""
    return config.standby if origins["standby"] != "default" else machine.kind == "cuda"


def end_with_router(environ: MutableMapping[str, str]) -> str:
    """End with the process that started this server as one of its copies, if one did; return the name for the log."""
    name, _, pid = environ.pop(COPY_VARIABLE, "").partition(":")
    if name:
        end_with_parent(signal.SIGKILL)
        if pid != str(os.getppid()):  # it ended before
            sys.exit(1)
    return name or "server"


def serve_copies(
    config: ServeConfig,
    origins: Mapping[str, str],
    keys: ServerKeys | None,
    notifier: Notifier,
    listener: HttpListener | None,
) -> int:
    """Start several copies and the router in front of them; return minus the signal that ended them. UserError."""
    from mgpu.orchestrator.router.server import RouterConfig, RouterServer

    planned = prepare(of_one_copy(config))
    copies = copy_commands(config, origins, planned)
    limits = replace(client_limits(config), max_sequences=config.max_sequences * len(copies))
    described = RouterConfig(config.bind, keys, http_options(config), config.drain_timeout_s, copies, limits=limits)
    return RouterServer(described, notifier, listener).run()


def read_again(config: ServeConfig, config_file: Path | None, flags: dict[str, Any]) -> Reloadable:
    """Read the configuration file and the keys again, for a server that runs with ``config``.

    Other changed options are only named. UserError when a file cannot be used.
    """
    if config_file is not None and config_file.exists() and not config_file.is_file():
        raise ConfigError(f"{config_file} is not a regular file and not read again: a pipe would hold up the server")
    changed, _ = read_config(config_file, flags)
    keys = keys_for(config.bind, changed.keys, needs_clients=False)
    needs_restart = tuple(
        each.name
        for each in declared_options()
        if each.field not in RELOADED and getattr(changed, each.field) != getattr(config, each.field)
    )
    api_keys = http_options(changed).api_keys
    return Reloadable(keys, client_limits(changed), changed.drain_timeout_s, needs_restart, api_keys)


def allow_open_files() -> None:
    """Raise a low limit of open files, also for child processes. UserError when that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= LEAST_FILES:
        return
    check_open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 4 * LEAST_FILES, hard))


def log_security(config: ServeConfig, keys: ServerKeys | None) -> None:
    """Log who can connect, if others than this user can."""
    log = logging.getLogger(__name__)
    if keys is not None:
        log.info("%s", describe(keys))
    elif config.keys and not config.join and not config.bind.startswith("tcp://"):
        log.warning("--keys has no effect: only tcp needs keys, and --bind is %s", config.bind or "the default, ipc")
    elif config.bind.startswith("tcp://"):
        log.info("every user of this machine can connect to %s; --keys would change that", config.bind)


def begin_log(config: ServeConfig, component: str = "server") -> None:
    """Log as the options say, in this process and in all that it starts."""
    os.environ[LEVEL_VARIABLE] = config.log_level
    os.environ[FORMAT_VARIABLE] = config.log_format
    configure_logging(component)


def server_config(config: ServeConfig, planned: PlannedModel, keys: ServerKeys | None) -> ServerConfig:
    """Build the configuration of the server from the options and the plan."""
    plan, checkpoint = planned.plan, planned.checkpoint
    ordinals = [device for stage in plan.layout.placement.stages for device in stage.devices]
    devices = {ordinal: plan.machine.devices[ordinal] for ordinal in ordinals}
    is_here = not plan.machine.hosts
    placed = [worker_environment(plan.machine, ordinal) for ordinal in ordinals if is_here]
    return ServerConfig(
        model=checkpoint.source,
        facts=plan.facts,
        model_name=config.served_name or planned.model.name,
        layout=plan.layout,
        layout_table=layout_for(plan, shutil.get_terminal_size().columns if sys.stderr.isatty() else None),
        limits=plan.limits,
        device_kind=plan.machine.kind,
        memory_fraction=config.memory_fraction,
        kv_memory=plan.kv_memory,
        # CPU workers measure nothing, and would take a pool that suits a machine without GPUs.
        worker_kv_memory=tuple(
            row.kv_bytes + row.all_state_bytes if row.device.kind == "cpu" and not plan.kv_memory else plan.kv_memory
            for row in plan.rows
        ),
        prefix_cache=config.prefix_cache and (plan.facts.linear is None or plan.limits.num_snapshots > 0),
        seed=config.seed,
        sampling=planned.sampling,
        tool_format=config.tool_format,
        reasoning_format=config.reasoning_format,
        bind=config.bind,
        keys=keys,
        client_limits=client_limits(config),
        http=http_options(config),
        logs_requests=config.access_log,
        timeouts=part_of(config, Timeouts),
        restarts=part_of(config, Restarts),
        worker_envs=tuple(environment for environment, _ in placed),
        worker_cpus=tuple(cpus_of_node(devices[ordinal].numa_node) for ordinal in ordinals if is_here),
        worker_devices=tuple(device for _, device in placed),
        gpu_uuids={ordinal: each.uuid for ordinal, each in devices.items() if each.kind == "cuda" and is_here},
    )
