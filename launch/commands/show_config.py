"""``mgpu-launch config``: what `serve` would use, and where each value came from."""

import json
from pathlib import Path
from typing import Any

import click

from mgpu.launch.config import declared_options
from mgpu.launch.config_file import config_text
from mgpu.launch.options import config_options, read_config
from mgpu.launch.pages.help import Command


@click.command(
    "config",
    cls=Command,
    short_help="Show the configuration that serve would use.",
    examples=(
        "MGPU_TP=2 mgpu-launch config --config server.toml",
        "mgpu-launch config -m ./model --tp 2 --toml > server.toml",
    ),
)
@config_options
@click.option("--json", "form", flag_value="json", help="Print values and origins as JSON.")
@click.option("--toml", "form", flag_value="toml", help="Print what was set as a configuration file.")
def config_command(config_file: Path | None, form: str | None, **flags: Any) -> None:
    """Show the configuration that serve would use, with the origin of every value."""
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
        click.echo(f"{option.name:<{width}}  {getattr(config, option.field)!r:<24}  {origins[option.name]}")
