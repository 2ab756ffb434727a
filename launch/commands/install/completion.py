"""``mgpu-launch completion``: the script with which a shell completes commands, options and values."""

import click
from click.shell_completion import get_completion_class

from mgpu.launch.pages.help import Command

PROGRAM = "mgpu-launch"
VARIABLE = f"_{PROGRAM}_COMPLETE".replace("-", "_").upper()
"""As click names it."""


@click.command(
    "completion",
    cls=Command,
    short_help="Print a completion script for your shell.",
    examples=(
        "source <(mgpu-launch completion bash)    # in ~/.bashrc",
        "source <(mgpu-launch completion zsh)     # in ~/.zshrc",
        "mgpu-launch completion fish > ~/.config/fish/completions/mgpu-launch.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print a script that completes commands, options, values and models.

    SHELL is bash, zsh or fish.
    """
    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None  # the choices are click's own
    click.echo(kind(root, {}, PROGRAM, VARIABLE).source())
