"""`serve --nodes N --join ADDRESS`: check the options, wait for the ranks of an outside launcher, plan with them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mgpu
from mgpu.launch.prepare import PlannedModel, find_model, plan_found
from mgpu.launch.settings.config import ServeConfig
from mgpu.launch.settings.values import ConfigError
from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.host.server_keys import load_worker_keys
from mgpu.orchestrator.host.signals import Signals
from mgpu.orchestrator.hosts.hosts import Hosts
from mgpu.orchestrator.hosts.machine import check_layout, machine_of
from mgpu.orchestrator.hosts.roster import Expected
from mgpu.orchestrator.server import Server
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.checkpoint.fingerprint import model_print
from mgpu.protocol.internal.commit import commit_of

_OF_ONE_MACHINE = ("replicas", "workers", "oversubscribe", "topology")
"""Options that say how this machine's processes are made."""


def check_hosts(config: ServeConfig) -> None:
    """Raise ConfigError if options for several hosts are incomplete, or contradict others."""
    if not config.nodes and not config.join:
        return
    if not config.nodes:
        raise ConfigError("--join waits for workers on other hosts: say on how many, such as --nodes 2")
    if not config.join:
        raise ConfigError(f"--nodes {config.nodes} needs the address where workers join: --join tcp://ADDRESS:5570")
    if not config.join.startswith("tcp://"):
        raise ConfigError(f"--join {config.join}: write tcp://ADDRESS:PORT, with an address of this host or * for all")
    if not config.keys:
        raise ConfigError(
            "--join needs --keys FOLDER, since workers see all requests: `mgpu-launch keygen` makes the folder, and "
            "`mgpu-launch keygen --worker NAME` the key of a host"
        )
    for name in _OF_ONE_MACHINE:
        if getattr(config, name) != getattr(ServeConfig(), name):
            raise ConfigError(
                f"--{name} does not go with --nodes: the launcher of the hosts decides how many workers there are; "
                "-n and --tp place layers on them"
            )


def serve_hosts(config: ServeConfig, make_server: Callable[[PlannedModel, Hosts], Server]) -> int:
    """Wait for all ranks, plan, and serve. Return the exit status. UserError; agents hear of it and end."""
    keys = load_worker_keys(config.keys)
    model, checkpoint = find_model(config)
    with Hosts(config.join, keys, config.nodes, _expected(config, model.path), config.join_timeout_s,
               config.host_timeout_s) as hosts:  # fmt: skip
        with Signals() as signals:
            if not hosts.wait_for_all(signals.fd):
                return -(signals.received or [15])[0]
        machine = machine_of(hosts.roster, dict(os.environ))
        planned = plan_found(replace(model, is_demo=False), checkpoint, config, machine)
        check_layout(planned.plan.layout, hosts.roster)
        return make_server(planned, hosts).run()


def _expected(config: ServeConfig, path: str) -> Expected:
    try:
        printed = model_print(path)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    commit = commit_of(Path(mgpu.__file__).parent)
    needs_weights = config.load_format != "dummy"
    return Expected(os.uname().nodename, mgpu.__version__, commit, printed, needs_weights)
