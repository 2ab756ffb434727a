"""``mgpu-launch config``: what `serve` would use, and where each value came from."""

import json
from pathlib import Path
from typing import Any

import click

from mgpu.launch.pages.help import Command
from mgpu.launch.settings.config import ServeConfig, declared_options
from mgpu.launch.settings.config_file import config_text
from mgpu.launch.settings.options import config_options, model_argument, read_config
from mgpu.orchestrator.errors import UserError
from mgpu.protocol.model.sampling import SamplingDefaults


@click.command(
    "config",
    cls=Command,
    short_help="Show the configuration that serve would use.",
    examples=(
        "MGPU_TP=2 mgpu-launch config --config server.toml",
        "mgpu-launch config ./model --tp 2 --toml > server.toml",
    ),
)
@model_argument
@config_options
@click.option("--json", "form", flag_value="json", help="Print values and origins as JSON.")
@click.option("--toml", "form", flag_value="toml", help="Print what was set as a configuration file.")
def config_command(config_file: Path | None, form: str | None, **flags: Any) -> None:
    """Show the configuration with which serve would serve MODEL, with the origin of every value."""
    config, origins = read_config(config_file, flags)
    options = declared_options()
    if form == "json":
        values = {each.name: {"value": getattr(config, each.field), "origin": origins[each.name]} for each in options}
        click.echo(json.dumps(values, indent=2))
        return
    if form == "toml":
        click.echo(config_text(config, origins), nl=False)
        return
    width = max(len(option.name) for option in options)
    for option in options:
        line = f"{option.name:<{width}}  {getattr(config, option.field)!r:<24}  {origins[option.name]}"
        click.echo(line + (_sampling_text(config) if option.name == "generation_config" else ""))


def _sampling_text(config: ServeConfig) -> str:
    """Say how requests are sampled that do not say; nothing if the model is not here."""
    try:
        return f": {_sampling(config)}"
    except (UserError, ImportError):  # no model, not here yet, or this is an installation of clients
        return ""


def _sampling(config: ServeConfig) -> SamplingDefaults:
    """Return the defaults of a model that is on this machine. UserError if it is not."""
    from mgpu.launch.prepare.planned_model import sampling_defaults
    from mgpu.orchestrator.models.find import resolve_model

    model = resolve_model(config.model, part="no weights", report=lambda line: None, offline=True)
    return sampling_defaults(config, model.path, model.format)
