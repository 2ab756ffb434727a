"""A group of commands that imports a command's module only when the command is named or listed."""

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from mgpu.launch.installed import WAY_OUT, NotInstalled, missing
from mgpu.launch.settings import peer_names


class LazyGroup(click.Group):
    """Finds commands by ``module:attribute``, in the order in which help lists them."""

    def __init__(
        self,
        *,
        homes: Mapping[str, str],
        hints: Mapping[str, str] | None = None,
        needs: Mapping[str, Sequence[str]] | None = None,
        **settings: Any,
    ) -> None:
        """``hints``: sentences about words that are no commands here. ``needs``: modules that a command imports."""
        super().__init__(**settings)
        self._homes = homes
        self._hints = hints or {}
        self._needs = needs or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._homes:
            return None
        try:
            return self._load(ctx, cmd_name)
        except NotInstalled:  # help and completion name it nevertheless
            return click.Command(cmd_name, short_help=f"(needs more: {WAY_OUT})")

    def _load(self, ctx: click.Context, name: str) -> click.Command:
        """Import a command. NotInstalled if it needs a package that is missing."""
        full_name, lacks = f"{ctx.command_path} {name}", missing(self._needs.get(name, ()))
        if lacks:
            raise NotInstalled(full_name, lacks)
        module, _, attribute = self._homes[name].partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("mgpu"):
                raise
            raise NotInstalled(full_name, [error.name]) from None
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Unknown names of commands and options are refused with the name that is meant."""
        if not args[0].startswith("-") and args[0] not in self._homes and not ctx.resilient_parsing:
            raise click.UsageError(self._no_such_command(args[0]), ctx)
        if args[0] in self._homes and not ctx.resilient_parsing:
            self._load(ctx, args[0])  # says what is missing, if anything is
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not isinstance(command, click.Group) and not ctx.resilient_parsing:
            check_options(command, rest, click.Context(command, info_name=name, parent=ctx))
        return name, command, rest

    def _no_such_command(self, typed: str) -> str:
        hint = self._hints.get(typed.lower(), "")
        close = "" if hint else _did_you_mean(typed, self._homes)
        known = "" if hint or close else f"The commands are: {', '.join(self._homes)}."
        return " ".join(filter(None, (f"No such command {typed!r}.", close, known, hint and _sentence(hint))))


def check_options(command: click.Command, args: Sequence[str], ctx: click.Context) -> None:
    """Raise UsageError for the first option that ``command`` lacks, if it is long or another program has it.

    click itself would suggest names that only look alike, and read ``-ngl 99`` as ``-n gl``.
    """
    options = [each for each in command.get_params(ctx) if isinstance(each, click.Option)]
    takes_value = {name: not each.is_flag for each in options for name in (*each.opts, *each.secondary_opts)}
    takes_value |= dict.fromkeys(ctx.help_option_names, False)
    own = list(takes_value)
    skip = False
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if skip or not arg.startswith("-") or arg == "-":
            skip = False
        elif arg == "--":
            return
        elif name in takes_value:
            skip = takes_value[name] and not equals
        else:
            following = args[place + 1] if place + 1 < len(args) else ""
            value = value if equals or following.startswith("-") else following
            hint = peer_names.option_hint(name, value, own, _value(args, "--host", "127.0.0.1"),
                                          _value(args, "--port", "PORT"))  # fmt: skip
            if hint or name.startswith("--"):
                text = _sentence(hint) if hint else _did_you_mean(name, own)
                raise click.UsageError(f"No such option {name!r}. {text}".strip(), ctx)


def _value(args: Sequence[str], option: str, default: str) -> str:
    found = re.search(rf"\0{option}[=\0]([^\0]+)\0", "\0" + "\0".join(args) + "\0")
    return found[1] if found else default


def _did_you_mean(typed: str, known: Iterable[str]) -> str:
    """Suggest names that are really near: ``--port`` and ``--tp`` are not."""
    bare = typed.lstrip("-")
    near = [each for each in known if difflib.SequenceMatcher(None, bare, each.lstrip("-")).ratio() >= 0.75
            or (len(bare) > 2 and each.lstrip("-").startswith(bare))]  # fmt: skip
    return f"Did you mean {' or '.join(map(repr, near[:3]))}?" if near else ""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
