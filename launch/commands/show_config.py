"""``mgpu-launch config``: what `serve` would use, and where each value came from."""

from pathlib import Path
from typing import Any

import click

from mgpu.launch.config import declared_options
from mgpu.launch.options import config_options, read_config
from mgpu.launch.pages.help import Command


@click.command(
    "config",
    cls=Command,
    examples=("MGPU_TP=2 mgpu-launch config --config server.toml",),
)
@config_options
def config_command(config_file: Path | None, **flags: Any) -> None:
    """Show the configuration that serve would use, with the origin of every value."""
    config, origins = read_config(config_file, flags)
    options = declared_options()
    width = max(len(option.name) for option in options)
    for option in options:
        click.echo(f"{option.name:<{width}}  {getattr(config, option.field)!r:<24}  {origins[option.name]}")
