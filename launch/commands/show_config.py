"""``mgpu-launch config``: what `serve` would use, and where each value came from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mgpu.launch.options import config_options, read_config


@click.command("config")
@config_options
def config_command(config_file: Path | None, **flags: Any) -> None:
    """Show the configuration that serve would use, with the origin of every value."""
    config, origins = read_config(config_file, flags)
    values = asdict(config)
    width = max(map(len, values))
    for name, value in values.items():
        click.echo(f"{name:<{width}}  {value!r:<24}  {origins[name]}")
