"""``mgpu-launch plan``: the layout that `serve` would choose, for this machine or a described one, without a GPU."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mgpu.launch.config import ServeConfig
from mgpu.launch.limits import client_limits
from mgpu.launch.options import config_options, read_config
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.models.find import ResolvedModel, check_loadable, read_model, read_model_to_plan, resolve_model
from mgpu.orchestrator.placement.devices import Machine, described_machine, find_machine
from mgpu.orchestrator.placement.options import batch_tokens, check_batch_tokens, implied_workers
from mgpu.orchestrator.placement.planner import LayoutOptions, Plan, plan
from mgpu.orchestrator.placement.table import layout_json, layout_text
from mgpu.protocol.checkpoint.read import Checkpoint


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model that has been found, read and placed, with nothing started yet."""

    model: ResolvedModel
    checkpoint: Checkpoint
    plan: Plan


def layout_options_of(config: ServeConfig) -> LayoutOptions:
    """Translate options, in which 0 and empty mean "not asked"."""
    return LayoutOptions(
        tp=config.tp or None,
        device_layers=config.device_layers or None,
        dtype=None if config.dtype == "auto" else config.dtype,
        max_seq_len=config.max_seq_len or None,
        memory_fraction=config.memory_fraction,
        kv_memory=int(config.kv_memory),
        block_size=config.block_size,
        max_rows=config.max_rows,
        max_batch_tokens=config.max_batch_tokens,
        quant=config.quant,
        kv_cache_dtype=config.kv_cache_dtype,
    )


def machine_of(config: ServeConfig, options: LayoutOptions) -> Machine:
    """Find the devices that the options speak of; a size or map also says how many CPU workers there are."""
    workers = config.workers or None
    if workers is None and (config.device == "cpu" or config.oversubscribe):
        workers = implied_workers(options)
    return find_machine(config.device, workers, config.oversubscribe)


def step_tokens(config: ServeConfig, machine: Machine) -> int:
    """Give the most tokens of a step there."""
    return batch_tokens(config.max_batch_tokens, config.max_rows, machine.kind, machine.least_bytes)


def plan_model(model: ResolvedModel, checkpoint: Checkpoint, config: ServeConfig, gpus: str = "") -> PlannedModel:
    """Place a model as the options say. UserError, with the numbers and what to type, when that cannot be."""
    options = layout_options_of(config)
    machine = described_machine(gpus) if gpus else machine_of(config, options)
    check_batch_tokens(step_tokens(config, machine), config.max_rows)
    return PlannedModel(model, checkpoint, plan(checkpoint.facts, machine, options))


def prepare(config: ServeConfig) -> PlannedModel:
    """Do for `serve` what comes before the first process: find the model, read its headers, place it."""
    model = resolve_model(
        config.model,
        part="no weights" if config.load_format == "dummy" else "all",
        report=lambda line: click.echo(line, err=True),
    )
    checkpoint = read_model(model, config.load_format)
    check_loadable(checkpoint)
    return plan_model(model, checkpoint, config)


def check_front(config: ServeConfig, keys_may_come: bool) -> None:
    """Refuse what `serve` would refuse, apart from folders and keys that may be there by then. UserError."""
    client_limits(config)
    if config.bind and not config.bind.startswith("ipc://"):
        from mgpu.orchestrator.gateway.front.endpoint import (
            check_endpoint,  # imports zmq, which planning can do without
        )

        check_endpoint(config.bind, has_keys=bool(config.keys) or keys_may_come)


@click.command("plan")
@config_options
@click.option("--gpus", default="", metavar="N|SIZES", help='Describe a machine: "4" (of 80 GiB) or "141GiB,80GiB".')
@click.option("--json", "as_json", is_flag=True, help="Print the layout as JSON.")
def plan_command(config_file: Path | None, gpus: str, as_json: bool, **flags: Any) -> None:
    """Show how a model would be laid out, without starting anything.

    Takes the options of serve. A model folder that holds only config.json is enough.
    """
    config, _ = read_config(config_file, flags)
    if gpus and (config.device == "cpu" or config.workers or config.oversubscribe):
        raise UserError("--gpus describes GPUs; drop --device cpu, --workers and --oversubscribe")
    check_front(config, keys_may_come=config_file is not None)  # a unit gets them as a credential
    model = resolve_model(config.model, part="config", report=lambda line: click.echo(line, err=True))
    planned = plan_model(model, read_model_to_plan(model), config, gpus)
    if as_json:
        click.echo(json.dumps({"model": model.name, **layout_json(planned.plan)}, indent=2))
    else:
        click.echo(f"model: {model.name}")
        click.echo(layout_text(planned.plan))
