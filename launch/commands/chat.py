"""``mgpu-launch chat``: talk to the running server. Ctrl-C ends the answer, not the program."""

import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mgpu.launch.commands.talk import print_pieces, server_errors, talk_options, typed
from mgpu.launch.pages.help import Command
from mgpu.protocol.client.client import Client
from mgpu.protocol.client.results import Piece
from mgpu.protocol.errors import RequestFailed

MULTI_LINE = '"""'
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?")
"""What a key such as an arrow writes into the line where there is no readline; the model shall not see it."""
SETTABLE: dict[str, Callable[[str], Any]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
HELP = """\
/help               list these commands
/clear, /new        start over; the system message stays
/system TEXT        set the system message; without TEXT remove it
/set OPTION VALUE   change {options}
/retry              answer the last message again
/save FILE          write the conversation as JSON
/bye, /exit, /quit  leave; so does Ctrl-D
\"\"\"                 begins and ends a message of several lines"""


@click.command(
    "chat",
    cls=Command,
    examples=(
        "mgpu-launch chat",
        "mgpu-launch chat --system 'Answer in one sentence.' --temperature 0.7",
    ),
)
@talk_options
@click.option("--system", default="", help="A system message before the first turn.")
def chat_command(endpoint: str | None, keys: str | None, timeout: float, system: str, **sampling: Any) -> None:
    """Chat with the model. Ctrl-C ends an answer; Ctrl-D leaves; /help lists the commands."""
    with server_errors(), Client(endpoint, timeout_s=timeout, keys=keys) as client:
        model = client.models()[0]
        if not model.get("chat", True):
            click.secho(
                f"{model['name']} has no chat template or no tokenizer, so it cannot chat; use mgpu-launch generate",
                fg="red", err=True,
            )  # fmt: skip
        click.secho(f"{model['name']} — Ctrl-C ends an answer, Ctrl-D leaves, /help lists commands", dim=True, err=True)
        edit_lines()
        Conversation(client, system, typed(sampling)).run()


def edit_lines() -> None:
    """Let the arrow keys edit and recall lines, if this Python has readline; input() uses it once it is imported."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


class Conversation:
    """What was said, and the commands that change it."""

    def __init__(self, client: Client, system: str, options: dict[str, Any]) -> None:
        self._client = client
        self._system = system
        self._options = options
        self._turns: list[dict[str, str]] = []
        self._last = ""
        """The last message of the user, also if it got no answer."""

    def run(self) -> None:
        """Read messages and commands until the end of input."""
        while (text := _read_message()) is not None:
            word, _, rest = text.strip().partition(" ")
            if word in ("/bye", "/exit", "/quit"):
                return
            if word.startswith("/") and "\n" not in text:
                self._command(word, rest.strip())
            elif word:
                self._say(text)

    def _command(self, word: str, rest: str) -> None:
        match word:
            case "/help" | "/?":
                _note(HELP.format(options=", ".join(SETTABLE)))
            case "/clear" | "/new":
                self._turns, self._last = [], ""
            case "/system":
                self._system = rest
            case "/set":
                self._set(rest)
            case "/retry" if self._last:
                if self._turns and self._turns[-2]["content"] == self._last:
                    self._turns = self._turns[:-2]
                self._say(self._last)
            case "/retry":
                _note("there is no message to answer again")
            case "/save" if rest:
                self._save(rest)
            case "/save":
                _note("type /save FILE")
            case _:
                _note(f"{word} is no command, and was not sent:\n{HELP.format(options=', '.join(SETTABLE))}")

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def _say(self, text: str) -> None:
        self._last = text
        turn = {"role": "user", "content": text}
        said = answer(self._client, [*self._opening(), *self._turns, turn], self._options)
        if said:  # a turn without an answer (refused, or stopped at once) is not part of the conversation
            self._turns += [turn, {"role": "assistant", "content": said}]

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name = name.lstrip("-").replace("-", "_")
        if name not in SETTABLE or not value.strip():
            _note(f"type /set OPTION VALUE; the options are {', '.join(SETTABLE)}")
            return
        try:
            self._options[name] = SETTABLE[name](value.strip())
        except ValueError:
            _note(f"{value.strip()!r} is no value of {name}")

    def _save(self, name: str) -> None:
        messages = [*self._opening(), *self._turns]
        try:
            Path(name).expanduser().write_text(json.dumps(messages, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except (OSError, RuntimeError, ValueError) as error:
            _note(f"cannot write {name}: {error}")
        else:
            _note(f"wrote {len(messages)} messages to {name}")


def _note(text: str) -> None:
    click.secho(text, dim=True, err=True)


def _read_message() -> str | None:
    """Return the next line, or the lines between triple quotes; None at the end of input."""
    line = _read_line("> ")
    if line is None or not line.lstrip().startswith(MULTI_LINE):
        return line
    text = line.lstrip().removeprefix(MULTI_LINE)
    while MULTI_LINE not in text:
        following = _read_line(". ")
        if following is None:
            return None
        text += "\n" + following
    return text.partition(MULTI_LINE)[0].strip("\n")


def _read_line(prompt: str) -> str | None:
    """Return the next line; None at the end of input. Ctrl-C at the prompt only clears the line."""
    while True:
        try:
            return _ESCAPE.sub("", input(prompt))
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo()


def answer(client: Client, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Stream one answer to the screen and return its text, up to Ctrl-C or a failure."""
    said: list[str] = []

    def remembered(piece: Piece) -> Piece:
        said.append(piece.text)
        return piece

    start_s = time.monotonic()
    try:
        with client.stream_chat(messages, **options) as pieces:
            usage = print_pieces(map(remembered, pieces))
    except KeyboardInterrupt:
        click.secho(" [stopped]", dim=True, err=True)
    except RequestFailed as error:
        click.secho(f"error: {error}", fg="red", err=True)
    else:
        click.echo()
        if usage is not None:
            rate = usage.completion_tokens / (time.monotonic() - start_s)
            click.secho(f"[{usage.completion_tokens} tokens, {rate:.1f} tokens/s]", dim=True, err=True)
    return "".join(said)
