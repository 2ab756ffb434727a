"""``mgpu-launch plan``: the layout that `serve` would choose, on this machine or a described one."""

import json
import shlex
import textwrap
from pathlib import Path
from typing import Any

import click

from mgpu.launch.pages.help import Command, GroupedOption
from mgpu.launch.pages.layout import WIDTH, narrow_layout
from mgpu.launch.prepare.planned_model import ground, note_missing_tokenizer, plan_model
from mgpu.launch.prepare.preflight import check_open_files, check_options
from mgpu.launch.settings.config import declared_options
from mgpu.launch.settings.config_file import config_text, write_new
from mgpu.launch.settings.options import config_options, model_argument, read_config
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.models.find import read_model_to_plan, resolve_model
from mgpu.orchestrator.placement.reports.recommend import (
    recommend,
    recommendation_json,
    recommendation_lines,
    stored_bits,
)
from mgpu.orchestrator.placement.reports.speed import estimate_speed, speed_json, speed_lines
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.orchestrator.placement.reports.written_topology import topology_text

_RECOMMENDED = ("tp", "tp_shares", "device_layers", "topology", "quant", "kv_cache_dtype")
"""Options that the table of layouts chooses."""


@click.command(
    "plan",
    cls=Command,
    short_help="Show how a model would be laid out, and what fits.",
    examples=(
        "mgpu-launch plan ./model                      # on this machine",
        "mgpu-launch plan ./model --gpus 2xH200        # on others, with their speed",
        "mgpu-launch plan ./model --gpus 24GiB,24GiB --quant 4",
        "mgpu-launch plan ./model --gpus 8xH200 --nodes 2 # two hosts",
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
    metavar="N|SIZES|KINDS",
    help='Describe a machine: "2xH200", "4" (of 80 GiB) or "141GiB,80GiB".',
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
@click.option(
    "--topology-out",
    cls=GroupedOption,
    group="Plan",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a new topology file of this layout, for --topology.",
)
def plan_command(
    config_file: Path | None,
    gpus: str,
    verbose: bool,
    as_json: bool,
    write: Path | None,
    topology_out: Path | None,
    **flags: Any,
) -> None:
    """Show how MODEL (or -m MODEL) would be laid out, without starting anything.

    Takes the options of serve. A model folder that holds only config.json is enough. Speeds are estimates.
    """
    config, origins = read_config(config_file, flags)
    if gpus and (config.device == "cpu" or config.workers or config.oversubscribe):
        raise UserError("--gpus describes GPUs; drop --device cpu, --workers and --oversubscribe")
    if not gpus:
        check_open_files()
    check_options(config, origins, keys_may_come=config_file is not None, only_plans=True)
    if config.replicas > 1 and not gpus:
        from mgpu.launch.prepare.replicas import of_one_copy  # imports zmq, which most plans can do without

        config = of_one_copy(config)
        click.echo(f"{flags.get('replicas') or 'several'} copies; each of them:", err=True)
    model = resolve_model(
        config.model, part="config", report=lambda line: click.echo(line, err=True), offline=config.offline
    )
    checkpoint = read_model_to_plan(model, config.load_format, config.model_code)
    planned = plan_model(model, checkpoint, config, gpus)
    note_missing_tokenizer(model)
    machine, options = ground(model, config, gpus)
    fitting = [] if machine.hosts else recommend(checkpoint.facts, machine, options, stored_bits(checkpoint.tensors))
    speed = estimate_speed(planned.plan)
    if as_json:
        also = {"speed": speed_json(speed), "recommended": recommendation_json(fitting)}
        click.echo(json.dumps({"model": model.name, **layout_json(planned.plan), **also}, indent=2))
    else:
        click.echo(f"model: {model.name}")
        click.echo(layout_text(planned.plan) if verbose else narrow_layout(planned.plan))
        for line in speed_lines(planned.plan, speed):
            click.echo(line if verbose else textwrap.fill(line, WIDTH, subsequent_indent="  "))
        click.echo("\n".join(recommendation_lines(serve_command_of(config.model, flags), fitting)), nl=bool(fitting))
    if topology_out is not None:
        write_new(topology_out, topology_text(planned.plan, f"The layout of {model.name}, by mgpu-launch plan."))
        click.echo(f"wrote {topology_out}; serve --topology {topology_out} uses it", err=True)
    if write is not None:
        layout = narrow_layout(planned.plan).splitlines()
        write_new(write, config_text(config, origins, [f"mgpu-launch serve --config {write}", "", *layout]))
        click.echo(f"wrote {write}; start the server with: mgpu-launch serve --config {write}", err=True)


def serve_command_of(model: str, flags: dict[str, Any]) -> str:
    """Return the command that serves a model with the options that were typed, but for those of the layout."""
    words = ["mgpu-launch", "serve", model]
    for option in declared_options():
        value = flags.get(option.name)
        if value is None or option.name in ("model", *_RECOMMENDED):
            continue
        words += [option.flag if value else f"--no-{option.flag[2:]}"] if option.type is bool else [option.flag, value]
    return shlex.join(map(str, words))
