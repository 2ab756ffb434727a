"""The manual page: what `--help` says of every command, as roff for `man`."""

from collections.abc import Iterator

import click

from mgpu import __version__


def manual(root: click.Group, program: str) -> str:
    """Return the page of a program and all its commands."""
    context = click.Context(root, info_name=program)
    lines = [
        f'.TH {_escaped(program.upper())} 1 "" "mgpu {__version__}"',
        ".SH NAME",
        f"{_escaped(program)} \\- {_escaped(_sentence(root))}",
        ".SH SYNOPSIS",
        *_usage(root, context),
        ".SH OPTIONS",
        *_options(root, context),
        ".SH COMMANDS",
        *_commands(root, context),
    ]
    return "\n".join(lines) + "\n"


def _commands(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None  # it was listed
        inner = click.Context(command, info_name=name, parent=context)
        yield f".SS {_escaped(inner.command_path)}"
        yield from _usage(command, inner)
        for paragraph in (command.help or command.get_short_help_str(200)).split("\n\n"):
            yield from (".PP", _escaped(" ".join(paragraph.split())))
        yield from _options(command, inner)
        for example in getattr(command, "examples", ()):
            yield from (".PP", ".EX", _escaped(example), ".EE")
        if isinstance(command, click.Group):
            yield from _commands(command, inner)


def _usage(command: click.Command, context: click.Context) -> list[str]:
    pieces = " ".join(command.collect_usage_pieces(context))
    return [".PP", f"\\fB{_escaped(context.command_path)}\\fR {_escaped(pieces)}"]


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for param in command.get_params(context):
        record = param.get_help_record(context) if isinstance(param, click.Option) else None
        if record is not None:
            yield from (".TP", f"\\fB{_escaped(record[0])}\\fR", _escaped(" ".join(record[1].split())))


def _sentence(command: click.Command) -> str:
    return command.get_short_help_str(200).rstrip(".")


def _escaped(text: str) -> str:
    """Return text that roff shows as it is."""
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain
