"""``mgpu-launch man``: the manual page."""

import click

from mgpu.launch.commands.install.completion import PROGRAM
from mgpu.launch.pages.help import Command
from mgpu.launch.pages.manual import manual


@click.command(
    "man",
    cls=Command,
    short_help="Print the manual page.",
    examples=("mgpu-launch man > ~/.local/share/man/man1/mgpu-launch.1",),
)
def man_command() -> None:
    """Print the manual page, for a folder in which man looks: the help of all commands on one page."""
    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group)
    click.echo(manual(root, PROGRAM), nl=False)
