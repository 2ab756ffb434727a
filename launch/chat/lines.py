"""Read what the user types: a line, pasted lines, or lines between triple quotes; edited, recalled and completed."""

import re
import sys
from collections.abc import Callable
from types import ModuleType

import click

from mgpu.launch.chat.history import History

MULTI_LINE = '"""'
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?")
"""What a key such as an arrow writes into the line where there is no readline; the model shall not see it."""

Completer = Callable[[str], list[str]]
"""Returns how the beginning of a line may go on."""


class Lines:
    """The input of one chat."""

    def __init__(self, history: History | None, complete: Completer) -> None:
        """With ``history``, lines of earlier chats are recalled and new ones kept. Only a terminal has all this."""
        self._history = history if sys.stdin.isatty() else None
        self._readline = _set_up_readline(complete)
        self._last = ""
        if self._readline is not None and self._history is not None:
            for entry in self._history.entries():
                self._readline.add_history(entry)

    def read(self) -> str | None:
        """Return the next message or command; None at the end of input. Ctrl-C drops what was typed of it."""
        while True:
            try:
                text = _read_message()
            except KeyboardInterrupt:
                click.echo()
                continue
            if text is not None and text.strip() and text != self._last:
                self._keep(text)
            return text

    def _keep(self, text: str) -> None:
        self._last = text
        if self._readline is not None:
            self._readline.add_history(text)
        if self._history is not None:
            self._history.add(text)


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
    try:
        return _ESCAPE.sub("", input(prompt))
    except EOFError:
        click.echo()
        return None


def _set_up_readline(complete: Completer) -> ModuleType | None:
    """Let the arrow keys edit and recall lines and Tab complete them, if this Python has readline."""
    try:
        import readline
    except ImportError:
        return None
    readline.set_auto_history(False)
    readline.set_completer_delims("")

    def choice(text: str, number: int) -> str | None:
        found = complete(text)
        return found[number] if number < len(found) else None

    readline.set_completer(choice)
    uses_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if uses_libedit else "tab: complete")
    return readline
