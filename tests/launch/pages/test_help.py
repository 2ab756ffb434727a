"""Help pages: they fit a terminal, group their options, and end with examples that work."""

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from mgpu.launch.cli import COMMANDS, cli
from mgpu.launch.lazy_group import check_options
from mgpu.launch.pages.help import WIDTH, Command
from mgpu.launch.settings.config import declared_options

GROUPED = ("serve", "plan", "config", "chat", "generate", "status", "top")


def command_lines(group: click.Group = cli, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield before
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from command_lines(command, (*before, name))
        else:
            yield (*before, name)


def help_of(*words: str, columns: int = 200) -> str:
    done = CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, [*words, "--help"], terminal_width=None)
    assert done.exit_code == 0, done.output
    return done.output


def named(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


@pytest.mark.parametrize("words", list(command_lines()), ids=" ".join)
@pytest.mark.parametrize("columns", [80, 200])
def test_every_page_fits_80_columns(words: tuple[str, ...], columns: int) -> None:
    text = help_of(*words, columns=columns)
    assert max(map(len, text.splitlines())) <= WIDTH == 80


@pytest.mark.parametrize("name", ["serve", "plan", "config"])
def test_the_page_begins_with_the_model_and_has_every_option_once(name: str) -> None:
    lines = help_of(name).splitlines()
    first = next(line for line in lines if line.startswith("  -"))
    assert first.startswith("  -m, --model")
    for option in declared_options():
        assert (
            sum(line.lstrip().split("-m, ")[-1].split("-n, ")[-1].startswith(f"{option.flag} ") for line in lines) == 1
        )
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[-2:] == ["Other options:", "Examples:"]
    assert len(titles) >= 6


def test_every_option_of_serve_is_in_a_group() -> None:
    assert {option.group for option in declared_options()} > {"Model", "Devices and layout", "Clients"}
    assert all(option.group for option in declared_options())


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_use_commands_and_options_that_exist(name: str) -> None:
    command = named(name)
    if isinstance(command, click.Group):
        return
    assert isinstance(command, Command)
    assert command.examples
    for line in command.examples:
        assert line in help_of(name)
        typed = re.search(r"mgpu-launch ([^|>)]*)", line)
        assert typed is not None
        words = shlex.split(typed[1], comments=True)
        assert words[0] == name
        check_options(command, words[1:], click.Context(command))


def test_defaults_are_written_as_people_type_them() -> None:
    text = " ".join(help_of("serve").split())
    for part in ("[default: 8MiB]", "[default: 256MiB]", "[default: 30]", "[default: on]"):
        assert part in text


def test_the_list_of_commands_cuts_no_sentence() -> None:
    for words in ((), ("bench",)):
        assert "..." not in help_of(*words, columns=80).split("Commands:")[1]


def test_an_option_that_says_no_has_no_second_no() -> None:
    assert "--http-no-auth" in help_of("serve")
    assert "--no-http-no-auth" not in help_of("serve")


def test_the_length_of_an_answer_without_max_tokens_is_said() -> None:
    for command, default in (("generate", "512"), ("chat", "what fits the context")):
        assert f"Longest answer, in tokens. [default: {default}]" in " ".join(help_of(command).split())
