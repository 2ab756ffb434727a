"""``mgpu-launch plan``: the layout that `serve` would choose, on this machine or a described one."""

import json
from pathlib import Path
from typing import Any

import click

from mgpu.launch.config_file import config_text, write_new
from mgpu.launch.options import config_options, model_argument, read_config
from mgpu.launch.pages.help import Command, GroupedOption
from mgpu.launch.pages.layout import narrow_layout
from mgpu.launch.preflight import check_open_files, check_options
from mgpu.launch.prepare import note_missing_tokenizer, plan_model
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
        "mgpu-launch plan ./model --write server.toml  # for serve --config",
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
@click.option(
    "--write",
    cls=GroupedOption,
    group="Plan",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a new configuration file with these options, for serve --config.",
)
def plan_command(
    config_file: Path | None, gpus: str, verbose: bool, as_json: bool, write: Path | None, **flags: Any
) -> None:
    """Show how MODEL (or -m MODEL) would be laid out, without starting anything.

    Takes the options of serve. A model folder that holds only config.json is enough.
    """
    config, origins = read_config(config_file, flags)
    if gpus and (config.device == "cpu" or config.workers or config.oversubscribe):
        raise UserError("--gpus describes GPUs; drop --device cpu, --workers and --oversubscribe")
    if not gpus:
        check_open_files()
    check_options(config, origins, keys_may_come=config_file is not None)
    model = resolve_model(
        config.model, part="config", report=lambda line: click.echo(line, err=True), offline=config.offline
    )
    checkpoint = read_model_to_plan(model, config.load_format)
    planned = plan_model(model, checkpoint, config, gpus)
    note_missing_tokenizer(model)
    if as_json:
        click.echo(json.dumps({"model": model.name, **layout_json(planned.plan)}, indent=2))
    else:
        click.echo(f"model: {model.name}")
        click.echo(layout_text(planned.plan) if verbose else narrow_layout(planned.plan))
    if write is not None:
        layout = narrow_layout(planned.plan).splitlines()
        write_new(write, config_text(config, origins, [f"mgpu-launch serve --config {write}", "", *layout]))
        click.echo(f"wrote {write}; start the server with: mgpu-launch serve --config {write}", err=True)
