"""Render the Markdown of an answer, on a terminal that can, if rich is installed (the extra `chat`).

An answer comes in pieces, and a block (a paragraph, a list item, a fenced block of code) can be rendered when it is
complete. Until then the raw end of the block is shown below what is rendered, and replaced by it.
"""

import os
import re
import sys
import time
from typing import TYPE_CHECKING

from mgpu.launch.pages.terminal import shown

if TYPE_CHECKING:
    from rich.markdown import Markdown
    from rich.text import Text

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_REFRESH_S = 0.08


def can_render() -> bool:
    """Return True if standard output is a terminal with cursor movements, and rich is installed."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def split_blocks(text: str) -> tuple[str, str]:
    """Return the complete blocks of ``text``, and the rest, of which more may come.

    A block ends before a line that follows an empty one and is not indented. Fenced code ends with its fence only.
    """
    end, at, fence, after_blank = 0, 0, "", False
    for line in text.splitlines(keepends=True):
        fenced = _FENCE.match(line)
        if fence:
            if fenced and fenced[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        else:
            if after_blank and not line[0].isspace():
                end = at
            fence = fenced[1] if fenced else ""
        after_blank = not fence and not line.strip()
        at += len(line)
    return text[:end], text[end:]


def markdown(text: str) -> "Markdown":
    """Return what rich prints. HTML is text, addresses of links are shown, and the lines of a paragraph stay lines."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    made = Markdown(text, hyperlinks=False)
    made.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    for token in made.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return made


class MarkdownScreen:
    """Shows one answer."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(highlight=False)
        self._live = Live(
            console=self._console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._pending = ""
        self._has_rendered = False
        self._next_refresh_s = 0.0

    def write(self, text: str) -> None:
        complete, self._pending = split_blocks(self._pending + shown(text))
        self._live.start()  # a second call does nothing
        if complete:
            self._live.update("")
            self._render(complete)
        if (now := time.monotonic()) >= self._next_refresh_s or complete:
            self._next_refresh_s = now + _REFRESH_S
            self._live.update(self._tail(), refresh=True)

    def finish(self) -> None:
        self._live.stop()
        if self._pending.strip():
            self._render(self._pending)
        self._pending = ""

    def _render(self, text: str) -> None:
        if self._has_rendered:
            self._console.print()
        self._has_rendered = True
        self._console.print(markdown(text))

    def _tail(self) -> "Text":
        """Return the last lines of the block that is not complete, as many as fit the terminal."""
        from rich.text import Text

        lines = Text(self._pending).wrap(self._console, self._console.width)
        return Text("\n").join(lines[-max(1, self._console.height - 2) :])
