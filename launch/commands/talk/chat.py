"""``mgpu-launch chat``: talk to the running server. Ctrl-C ends the answer, not the program."""

from collections.abc import Callable
from typing import Any

import click

from mgpu.launch.chat.answer import PlainScreen, Screen
from mgpu.launch.chat.conversation import Conversation, completions
from mgpu.launch.chat.history import History, history_file
from mgpu.launch.chat.lines import Lines
from mgpu.launch.chat.markdown import MarkdownScreen, can_render
from mgpu.launch.chat.settings import Settings
from mgpu.launch.commands.talk.options import NO_MODEL, server_errors, talk_options, typed
from mgpu.launch.pages.help import Command
from mgpu.protocol.client.client import Client


@click.command(
    "chat",
    cls=Command,
    no_argument=f"{NO_MODEL} Messages are typed in the chat.",
    examples=(
        "mgpu-launch chat",
        "mgpu-launch chat --system 'Answer in one sentence.' --temperature 0.7",
    ),
)
@talk_options("[default: what fits the context]")
@click.option("--system", default="", help="A system message before the first turn.")
@click.option("--no-markdown", is_flag=True, help="Show Markdown as it comes; rendering it needs the extra mgpu[chat].")
@click.option("--no-history", is_flag=True, help="Neither read nor write the history of messages.")
def chat_command(
    endpoint: str | None,
    keys: str | None,
    timeout: float,
    system: str,
    no_markdown: bool,
    no_history: bool,
    **sampling: Any,
) -> None:
    """Chat with the model. Ctrl-C ends an answer; Ctrl-D leaves; /help lists the commands."""
    with server_errors(), Client(endpoint, timeout_s=timeout, keys=keys) as client:
        model = client.models()[0]
        if not model.get("chat", True):
            click.secho(
                f"{model['name']} has no chat template or no tokenizer, so it cannot chat; use mgpu-launch generate",
                fg="red", err=True,
            )  # fmt: skip
        click.secho(f"{model['name']} — Ctrl-C ends an answer, Ctrl-D leaves, /help lists commands", dim=True, err=True)
        file = None if no_history else history_file()
        lines = Lines(None if file is None else History(file), completions)
        screen: Callable[[], Screen] = MarkdownScreen if can_render() and not no_markdown else PlainScreen
        Conversation(client, system, Settings(typed(sampling)), screen).run(lines.read)
