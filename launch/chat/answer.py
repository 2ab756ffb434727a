"""Show one answer while it comes. Ctrl-C ends the answer, not the program."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import click

from mgpu.launch.pages.terminal import shown
from mgpu.protocol.client.client import Client
from mgpu.protocol.client.requests.results import Usage
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.internal.counted import counted


class Screen(Protocol):
    """Where the text of an answer goes."""

    def write(self, text: str) -> None:
        """Show more text."""

    def finish(self) -> None:
        """Show what was held back, and begin a new line."""


class PlainScreen:
    """Shows the text as it is."""

    def __init__(self) -> None:
        self._has_begun = False

    def write(self, text: str) -> None:
        self._has_begun = True
        click.echo(shown(text), nl=False)

    def finish(self) -> None:
        if self._has_begun:
            click.echo()


@dataclass(frozen=True, slots=True)
class Said:
    """What became of a question."""

    text: str
    """As far as it has come."""
    error: MgpuError | None = None


def answer(client: Client, messages: Sequence[dict[str, str]], options: dict[str, Any], screen: Screen) -> Said:
    """Stream one answer to the screen, then print its speed, or why it has ended early."""
    said: list[str] = []
    usage, finish_reason, start_s, first_s = None, None, time.monotonic(), 0.0
    is_thinking = False
    try:
        with first_interrupt_only(), client.stream_chat(messages, **options) as pieces:
            try:
                for piece in pieces:
                    first_s = first_s or time.monotonic()
                    if piece.reasoning:
                        is_thinking = True
                        click.secho(shown(piece.reasoning), dim=True, nl=False)
                    if piece.text and is_thinking:
                        is_thinking = False
                        click.echo("\n")
                    said.append(piece.text)
                    usage = piece.usage or usage
                    finish_reason = piece.finish_reason or finish_reason
                    if piece.text:
                        screen.write(piece.text)
            finally:
                screen.finish()
                if is_thinking:
                    click.echo()
    except KeyboardInterrupt:
        click.secho("[stopped]", dim=True, err=True)
    except MgpuError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        return Said("".join(said), error)
    else:
        if usage is not None:
            click.secho(f"[{_speed(usage, start_s, first_s, time.monotonic())}]", dim=True, err=True)
        if finish_reason == "length":
            click.secho(f"[{_cut(options)}]", dim=True, err=True)
    return Said("".join(said))


def _cut(options: dict[str, Any]) -> str:
    """Say why an answer ended before its end."""
    if "max_tokens" in options:
        return f"cut at max_tokens {options['max_tokens']}; /set max_tokens N allows more"
    return "cut: the context is full; /clear starts over"


def _speed(usage: Usage, start_s: float, first_s: float, end_s: float) -> str:
    """Say how fast the answer came: the time to its first token, and tokens per second from then on."""
    tokens = usage.completion_tokens
    rate = (tokens - 1) / (end_s - first_s) if tokens > 1 and end_s > first_s else tokens / (end_s - start_s)
    return f"{counted(tokens, 'token')}, first after {first_s - start_s:.2f} s, {rate:.1f} tokens/s"


@contextmanager
def first_interrupt_only() -> Iterator[None]:
    """Raise KeyboardInterrupt for the first Ctrl-C only: a second one, pressed in haste, must not end the program."""
    interrupted = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
