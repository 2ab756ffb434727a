"""Options and printing of the commands that talk to a server."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import click

from mgpu.launch.completion import complete_endpoint, complete_file
from mgpu.launch.pages.help import GroupedOption
from mgpu.launch.pages.terminal import shown
from mgpu.orchestrator.errors import UserError
from mgpu.protocol.client.requests.results import Piece, Usage
from mgpu.protocol.errors import MgpuError

NO_MODEL = (
    "The model is chosen when the server starts: 'mgpu-launch serve MODEL'. "
    "Of several servers, --endpoint MODEL chooses one."
)
"""What to say to a word behind a command that talks to a running server."""

F = TypeVar("F", bound=Callable[..., Any])


class ServerError(UserError):
    """The server is missing, or it refused or ended the request."""

    exit_code = 69


@contextlib.contextmanager
def server_errors() -> Iterator[None]:
    """Turn an error of the client into a ServerError."""
    try:
        yield
    except MgpuError as error:
        raise ServerError(str(error)) from error


def server_options(command: F) -> F:
    """Add endpoint and keys, which arrive as None where they were not typed."""
    for name, complete, text in (
        ("--keys", complete_file, "This client's key file, for a server that wants one (default: MGPU_KEYS)."),
        ("--endpoint", complete_endpoint, "Server to use, or its model (default: MGPU_ENDPOINT, else the one here)."),
    ):
        command = click.option(name, cls=GroupedOption, group="Server", shell_complete=complete, help=text)(command)
    return command


def talk_options(longest: str) -> Callable[[F], F]:
    """Add endpoint, keys, time limit and sampling; options that were not typed arrive as None.

    ``longest`` says how long an answer gets without --max-tokens.
    """
    return lambda command: _with_talk_options(command, longest)


def _with_talk_options(command: F, longest: str) -> F:
    for names, settings in reversed(
        [
            (("--max-tokens",), {"type": int, "help": f"Longest answer, in tokens. {longest}"}),
            (("--temperature",), {"type": float, "help": "0 is greedy. [default: what the model says, else 0]"}),
            (("--top-p",), {"type": float, "help": "Sample from the likeliest tokens of this total probability."}),
            (("--top-k",), {"type": int, "help": "Sample from this many likeliest tokens."}),
            (("--seed",), {"type": int, "help": "Same seed, same answer."}),
            (("--timeout",), {"type": float, "default": 600.0, "show_default": True, "help": "Seconds per answer."}),
        ]
    ):
        command = click.option(*names, cls=GroupedOption, group="Answer", **settings)(command)
    return server_options(command)


def typed(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the user typed."""
    return {name: value for name, value in options.items() if value is not None}


def print_pieces(pieces: Iterable[Piece]) -> Usage | None:
    """Write the text as it arrives, and return the usage that comes with the last piece."""
    usage = None
    for piece in pieces:
        sys.stdout.write(shown(piece.text))
        sys.stdout.flush()
        usage = piece.usage or usage
    return usage
