"""`serve --nodes N --join ADDRESS`: wait for the ranks of an outside launcher, and plan with them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mgpu
from mgpu.launch.prepare.planned_model import PlannedModel, find_model, plan_found
from mgpu.launch.settings.config import ServeConfig
from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.host.server_keys import load_worker_keys
from mgpu.orchestrator.host.signals import Signals
from mgpu.orchestrator.hosts.hosts import Hosts
from mgpu.orchestrator.hosts.machine import check_layout, machine_of
from mgpu.orchestrator.hosts.roster import Expected
from mgpu.orchestrator.server import Server
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.checkpoint.fingerprint import model_print
from mgpu.protocol.internal.process.commit import commit_of


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
