"""Options of the benchmarks: what each of them takes, and numbers such as ``--batches 1,8,64`` and ``--seconds 1``."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from mgpu.launch.bench.shapes import SHAPES
from mgpu.launch.server_process import orderly_end

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
Sizes = tuple[tuple[int, int], ...]

LONGEST_S = 86400


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user typed about the server and the measuring."""

    model: str
    shape: str | None
    bandwidth: str
    repeat: int
    save: Path | None
    serve_options: tuple[str, ...]


def target_options(command: F) -> F:
    """Add what every benchmark takes; it arrives as one `Wanted`."""

    @functools.wraps(command)  # which also keeps the options that are declared below this one
    def wrapped(**values: Any) -> Any:
        wanted = Wanted(**{field.name: values.pop(field.name) for field in fields(Wanted)})
        with orderly_end():
            return command(wanted, **values)

    for option in (
        click.argument("serve_options", nargs=-1, type=click.UNPROCESSED),
        click.option(
            "--save", type=click.Path(path_type=Path, dir_okay=False), help="Write the rows: .csv, else JSON."
        ),
        click.option(
            "--repeat", default=5, show_default=True, type=click.IntRange(1), help="Runs; the table has their medians."
        ),
        click.option(
            "--bandwidth",
            default="",
            metavar="SPEED",
            help="Read bandwidth of one GPU, such as 4.30TB/s, for shares of the limit (CPU: else measured).",
        ),
        click.option(
            "--shape",
            type=click.Choice(list(SHAPES)),
            metavar="NAME",
            help=f"Random weights of this shape, instead of -m: {', '.join(SHAPES)}.",
        ),
        click.option(
            "--model", "-m", default="", help="A model, as for serve; a folder with only config.json is enough."
        ),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def list_option(flag: str, default: str, help_text: str) -> Callable[[F], F]:
    """Declare a list of positive whole numbers."""
    callback = whole_numbers
    return click.option(flag, default=default, show_default=True, metavar="N,N,…", callback=callback, help=help_text)


def seconds_option(default: float, help_text: str) -> Callable[[F], F]:
    """Declare ``--seconds``."""
    return click.option("--seconds", type=float, default=default, show_default=True, callback=seconds, help=help_text)


def seconds(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    """Return the seconds to count. BadParameter for times that are too long to wait for or too short to count in."""
    if not 0.01 <= value <= LONGEST_S:
        raise click.BadParameter(f"{value:g} is not between 0.01 and {LONGEST_S}")
    return value


def whole_numbers(_ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    """Read ``1,8,64``. BadParameter for anything that is no list of positive whole numbers, or empty without leave."""
    least = 1 if param.default else 0
    return _listed(text, int, lambda number: number > 0, "of positive whole numbers such as 1,8,64", least)


def rates(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[float, ...]:
    """Read ``0.5,2``. BadParameter for anything that is no list of positive numbers."""
    return _listed(text, float, lambda number: 0 < number < float("inf"), "of positive numbers such as 0.5,2", 0)


def sizes(_ctx: click.Context, _param: click.Parameter, text: str) -> Sizes:
    """Read ``32x1024,4x8192``. BadParameter for anything that is no list of COUNTxLENGTH."""
    return _listed(text, _pair, lambda pair: min(pair) > 0, "such as 32x1024,4x8192", 1)


def _pair(text: str) -> tuple[int, int]:
    count, length = text.split("x")
    return int(count), int(length)


def _listed(text: str, read: Callable[[str], T], is_right: Callable[[T], bool], what: str, least: int) -> tuple[T, ...]:
    """Read parts between commas. BadParameter when one of them is wrong, or when there are fewer than ``least``."""
    with contextlib.suppress(ValueError):
        items = tuple(read(part) for part in text.split(",") if part.strip())
        if len(items) >= least and all(map(is_right, items)):
            return items
    raise click.BadParameter(f"{text!r} is not a list {what}")
