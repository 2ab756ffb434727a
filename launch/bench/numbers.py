"""Options that are lists: ``--batches 1,8,64``, ``--rate 0.5,2`` and ``--sizes 32x1024,4x8192``."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
Sizes = tuple[tuple[int, int], ...]


def list_option(flag: str, default: str, help_text: str) -> Callable[[F], F]:
    """Declare a list of positive whole numbers."""
    callback = whole_numbers
    return click.option(flag, default=default, show_default=True, metavar="N,N,…", callback=callback, help=help_text)


def whole_numbers(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[int, ...]:
    """Read ``1,8,64``. BadParameter for anything that is no list of positive whole numbers."""
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0,)
    if any(number <= 0 for number in numbers):
        raise click.BadParameter(f"{text!r} is not a list of positive whole numbers such as 1,8,64")
    return numbers


def rates(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[float, ...]:
    """Read ``0.5,2``. BadParameter for anything that is no list of positive numbers."""
    try:
        numbers = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (0.0,)
    if not all(0 < number < float("inf") for number in numbers):
        raise click.BadParameter(f"{text!r} is not a list of positive numbers such as 0.5,2")
    return numbers


def sizes(_ctx: click.Context, _param: click.Parameter, text: str) -> Sizes:
    """Read ``32x1024,4x8192``. BadParameter for anything that is no list of COUNTxLENGTH."""
    try:
        pairs = [tuple(map(int, part.split("x"))) for part in text.split(",") if part.strip()]
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 or min(pair) <= 0 for pair in pairs):
        raise click.BadParameter(f"{text!r} is not a list such as 32x1024,4x8192")
    return tuple((pair[0], pair[1]) for pair in pairs)
