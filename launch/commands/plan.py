"""``mgpu-launch plan``: the layout that `serve` would choose, on this machine or a described one."""

import json
from pathlib import Path
from typing import Any

import click

from mgpu.launch.config import ServeConfig
from mgpu.launch.options import config_options, model_argument, read_config
from mgpu.launch.pages.help import Command, GroupedOption
from mgpu.launch.pages.layout import narrow_layout
from mgpu.launch.prepare import client_limits, note_missing_tokenizer, plan_model
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.models.find import read_model_to_plan, resolve_model
from mgpu.orchestrator.placement.table import layout_json, layout_text


@click.command(
    "plan",
    cls=Command,
    examples=(
        "mgpu-launch plan ./model                      # on this machine",
        "mgpu-launch plan ./model --gpus 4             # on 4 GPUs of 80 GiB",
        "mgpu-launch plan ./model --gpus 24GiB,24GiB --quant 4",
    ),
)
@model_argument
@config_options
@click.option(
    "--gpus",
    cls=GroupedOption,
    group="Plan",
    default="",
    metavar="N|SIZES",
    help='Describe a machine: "4" (of 80 GiB) or "141GiB,80GiB".',
)
@click.option(
    "-v",
    "--verbose",
    cls=GroupedOption,
    group="Plan",
    is_flag=True,
    help="Print the wide table, as in the log of serve.",
)
@click.option("--json", "as_json", cls=GroupedOption, group="Plan", is_flag=True, help="Print the layout as JSON.")
def plan_command(config_file: Path | None, gpus: str, verbose: bool, as_json: bool, **flags: Any) -> None:
    """Show how MODEL (or -m MODEL) would be laid out, without starting anything.

    Takes the options of serve. A model folder that holds only config.json is enough.
    """
    config, _ = read_config(config_file, flags)
    if gpus and (config.device == "cpu" or config.workers or config.oversubscribe):
        raise UserError("--gpus describes GPUs; drop --device cpu, --workers and --oversubscribe")
    check_front(config, keys_may_come=config_file is not None)  # a unit gets them as a credential
    model = resolve_model(
        config.model, part="config", report=lambda line: click.echo(line, err=True), offline=config.offline
    )
    checkpoint = read_model_to_plan(model)
    planned = plan_model(model, checkpoint, config, gpus)
    note_missing_tokenizer(model)
    if as_json:
        click.echo(json.dumps({"model": model.name, **layout_json(planned.plan)}, indent=2))
    else:
        click.echo(f"model: {model.name}")
        click.echo(layout_text(planned.plan) if verbose else narrow_layout(planned.plan))


def check_front(config: ServeConfig, keys_may_come: bool) -> None:
    """Raise the UserError that `serve` would raise for its front; folders and keys may still be made until then."""
    client_limits(config)
    if config.bind and not config.bind.startswith("ipc://"):
        from mgpu.orchestrator.gateway.front.endpoint import (
            check_endpoint,  # imports zmq, which planning can do without
        )

        check_endpoint(config.bind, has_keys=bool(config.keys) or keys_may_come)
