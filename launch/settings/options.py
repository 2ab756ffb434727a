"""Click options made from the declared configuration."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mgpu.launch.completion import complete_choices, complete_file, complete_folder, complete_model
from mgpu.launch.pages.help import GroupedOption
from mgpu.launch.settings.config import ServeConfig, declared_options, load_config
from mgpu.launch.settings.values import Bytes, Option, Tokens

_COMPLETE = {
    "model": complete_model,
    "keys": complete_folder,
    **dict.fromkeys(("http_keys", "http_tls_cert", "http_tls_key"), complete_file),
}
F = TypeVar("F", bound=Callable[..., Any])
POSITIONAL = "positional_model"
"""The model as `model_argument` hands it over."""


def http_flags(command: F) -> F:
    """Add the flags of the options about HTTP and the log. Flags that were not typed arrive as None."""
    for option in reversed(declared_options()):
        if option.name.startswith(("http", "log_")):
            command = _click_option(option)(command)
    return command


def config_options(command: F) -> F:
    """Add ``--config`` and one flag per option. Flags that were not typed arrive as None."""
    for option in reversed(declared_options()):
        command = _click_option(option)(command)
    file_option = click.option(
        "--config",
        "config_file",
        cls=GroupedOption,
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="MGPU_CONFIG",
        help="TOML file with any of these options.",
    )
    return file_option(command)


def model_argument(command: F) -> F:
    """Let the model also be named without ``-m``."""
    return click.argument(POSITIONAL, metavar="[MODEL]", required=False, shell_complete=complete_model)(command)


_WIDEST_CHOICES = 60
"""Characters of choices that fit beside an option on a help page; more are part of its text, which is wrapped."""


def _click_option(option: Option) -> Callable[[F], F]:
    default = f" [default: {_shown(option.default)}]" if option.default not in ("", 0, False) else ""
    choices = "|".join(option.choices)
    has_many = len(choices) > _WIDEST_CHOICES
    text = option.help + (f" One of {', '.join(option.choices)}." if has_many else "") + default
    grouped: dict[str, Any] = {"cls": GroupedOption, "group": option.group, "default": None, "help": text}
    if option.type is bool and "-no-" in option.flag:
        return click.option(option.flag, option.name, is_flag=True, **grouped)
    if option.type is bool:
        return click.option(f"{option.flag}/--no-{option.flag[2:]}", option.name, **grouped)
    names = [option.short, option.flag] if option.short else [option.flag]
    kind = {int: "N", Tokens: "N", float: "X", Bytes: "SIZE"}.get(option.type, "TEXT")
    metavar = "NAME" if has_many else choices or kind
    complete = complete_choices(option.choices) if option.choices else _COMPLETE.get(option.name)
    return click.option(*names, option.name, metavar=metavar, type=str, shell_complete=complete, **grouped)


def _shown(default: object) -> object:
    """Write a default as people type it."""
    if isinstance(default, Bytes):
        units = ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, ""))
        return next(f"{default >> shift}{unit}" for shift, unit in units if default % (1 << shift) == 0)
    if isinstance(default, float):
        return f"{default:g}"
    return "on" if default is True else default


def read_config(config_file: Path | None, flags: dict[str, Any]) -> tuple[ServeConfig, dict[str, str]]:
    """Merge what was typed with environment and file; see `load_config`."""
    typed = {name: value for name, value in flags.items() if value is not None}
    positional = typed.pop(POSITIONAL, None)
    if positional is not None and typed.setdefault("model", positional) != positional:
        raise click.UsageError(f"two models: {positional!r}, and -m {typed['model']!r}; name one")
    return load_config(typed, os.environ, config_file)
