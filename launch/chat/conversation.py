"""What was said in a chat, and the commands that change it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import click

from mgpu.launch.chat.answer import Screen, answer
from mgpu.launch.chat.settings import RULES, Settings
from mgpu.protocol.client.client import Client
from mgpu.protocol.internal.counted import counted

HELP = """\
/help               list these commands
/clear, /new        start over; the system message stays
/system TEXT        set the system message; without TEXT remove it
/set OPTION VALUE   change an option of the answers; /set alone lists them
/retry              answer the last message again
/save FILE          write the conversation as JSON
/bye, /exit, /quit  leave; so does Ctrl-D
\"\"\"                 begins and ends a message of several lines"""
_LEAVE = ("/bye", "/exit", "/quit")
_COMMANDS = ("/help", "/clear", "/new", "/system ", "/set ", "/retry", "/save ", *_LEAVE)


def completions(line: str) -> list[str]:
    """Return how a line that begins with a command may go on."""
    if line.startswith("/set "):
        return [f"/set {name} " for name in RULES if f"/set {name}".startswith(line)]
    return [command for command in _COMMANDS if line.startswith("/") and command.startswith(line)]


class Conversation:
    """The turns so far."""

    def __init__(self, client: Client, system: str, settings: Settings, screen: Callable[[], Screen]) -> None:
        """``screen`` makes the place for one answer."""
        self._client = client
        self._system = system
        self._settings = settings
        self._screen = screen
        self._turns: list[dict[str, str]] = []
        self._last = ""
        """The last message of the user, also if it got no answer."""
        self._is_answered = False
        """The last message is the last turn."""
        self._saved: set[Path] = set()

    def run(self, read: Callable[[], str | None]) -> None:
        """Take messages and commands until the user leaves or ``read`` returns None."""
        while (text := read()) is not None:
            word, _, rest = text.rstrip().partition(" ")
            if word in _LEAVE:
                return
            if word.startswith("/") and "\n" not in text:
                self._command(word, rest.strip())
            elif text.strip():
                self._say(text.strip(" "))

    def _command(self, word: str, rest: str) -> None:
        match word:
            case "/help" | "/?":
                note(HELP)
            case "/clear" | "/new":
                self._turns, self._last, self._is_answered = [], "", False
            case "/system":
                self._system = rest
            case "/set":
                note(self._settings.set(rest))
            case "/retry":
                self._retry()
            case "/save":
                self._save(rest)
            case _:
                note(f"{word} is no command, and was not sent (with a space before it, it is a message):\n{HELP}")

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def _say(self, text: str) -> None:
        self._last, self._is_answered = text, False
        turn = {"role": "user", "content": text}
        messages = [*self._opening(), *self._turns, turn]
        said = answer(self._client, messages, self._settings.options(), self._screen())
        if said.text:  # a turn without an answer (refused, or stopped at once) is not part of the conversation
            self._turns += [turn, {"role": "assistant", "content": said.text}]
            self._is_answered = True
        elif fitting := re.search(r"use max_tokens (\d+) or less", str(said.error)):
            note(f"/set max_tokens {fitting[1]} makes it fit")
        elif said.error is not None and self._turns:
            note("/clear starts over, /retry asks again")

    def _retry(self) -> None:
        """Answer the last message again. An answer is replaced only if another one comes."""
        if not self._last:
            note("there is no message to answer again")
            return
        before = self._turns
        if self._is_answered:
            self._turns = self._turns[:-2]
        self._say(self._last)
        if not self._is_answered:
            self._is_answered = len(before) > len(self._turns)
            self._turns = before
        elif before[-1:] == self._turns[-1:]:
            note("the same answer again; with /set temperature 0.8 and /set seed default it may differ")

    def _save(self, name: str) -> None:
        if not name:
            note("type /save FILE")
            return
        messages = [*self._opening(), *self._turns]
        try:
            path = Path(name).expanduser().absolute()
            if path.exists() and path not in self._saved:
                note(f"{path} exists; name another file")
                return
            path.write_text(json.dumps(messages, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except (OSError, RuntimeError, ValueError) as error:
            note(f"cannot write {name}: {error}")
        else:
            self._saved.add(path)
            note(f"wrote {counted(len(messages), 'message')} to {path}")


def note(text: str) -> None:
    """Tell the user something that is not the model's."""
    if text:
        click.secho(text, dim=True, err=True)
