"""Help pages: options in groups, examples at the end, lines of at most 80 columns."""

from collections.abc import Sequence
from typing import Any

import click

WIDTH = 80
OTHER = "Other options"
"""The last group, of options that name none."""


class GroupedOption(click.Option):
    """An option that help lists in a group."""

    def __init__(self, *names: Any, group: str = OTHER, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


class Command(click.Command):
    """A command whose help has groups of options, in the order in which they first appear, and examples."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), no_argument: str = "", **settings: Any) -> None:
        """``examples``: what to type, each a line; after ``#`` comes what it does.

        ``no_argument``: what to say to a word behind a command that takes none.
        """
        super().__init__(*args, **settings)
        self._no_argument = no_argument
        self.examples = tuple(examples)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_extra_args = ctx.allow_extra_args or bool(self._no_argument)
        rest = super().parse_args(ctx, args)
        if rest and self._no_argument and not ctx.resilient_parsing:
            ctx.fail(f"{ctx.info_name} takes no argument, and got {rest[0]!r}. {self._no_argument}")
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(param, "group", OTHER), []).append(record)
        other = groups.pop(OTHER, [])
        for title, records in {**groups, (OTHER if groups else "Options"): other}.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
