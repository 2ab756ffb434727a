"""``mgpu-launch top``: the page of `status`, refreshed until q or Ctrl-C."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator

import click

from mgpu.launch.commands.talk.options import NO_MODEL, server_errors, server_options
from mgpu.launch.pages.help import Command
from mgpu.launch.pages.status import ask, page
from mgpu.protocol.client.client import Client

OWN_SCREEN, USUAL_SCREEN, CLEAR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[H\x1b[J"
"""A screen of its own, so that what was on the terminal before is there again at the end."""


@click.command(
    "top",
    cls=Command,
    no_argument=NO_MODEL,
    short_help="Show the page of status, refreshed.",
    examples=("mgpu-launch top --interval 5",),
)
@server_options
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True, help="Seconds.")
def top_command(endpoint: str | None, keys: str | None, interval: float) -> None:
    """Show the page of status again and again. q or Ctrl-C ends it.

    Where the output is no terminal, the page is printed once.
    """
    with server_errors(), Client(endpoint, keys=keys) as client:
        text = page(ask(client))
        if sys.stdout.isatty():
            with own_screen(), pressed_keys() as keyboard, contextlib.suppress(KeyboardInterrupt):
                text = refresh(client, text, interval, keyboard)
    click.echo(text)


def refresh(client: Client, text: str, interval_s: float, keyboard: int | None) -> str:
    """Draw the page every ``interval_s`` until q is pressed; return the last one. MgpuError when the server is gone."""
    try:
        while True:
            sys.stdout.write(f"{CLEAR}{text}\n\nq ends\n")
            sys.stdout.flush()
            if is_pressed(keyboard, interval_s, b"qQ"):
                return text
            text = page(ask(client))
    except KeyboardInterrupt:
        return text


def is_pressed(keyboard: int | None, wait_s: float, keys: bytes) -> bool:
    """Wait that long for one of the keys. At the end of input there is nothing more to wait for but the time."""
    deadline_s = time.monotonic() + wait_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        ready = select.select([] if keyboard is None else [keyboard], [], [], left_s)[0]
        if ready and keyboard is not None:
            typed = os.read(keyboard, 64)
            if set(typed) & set(keys):
                return True
            if not typed:
                keyboard = None
    return False


@contextlib.contextmanager
def own_screen() -> Iterator[None]:
    """Draw on a screen of its own inside the block."""
    sys.stdout.write(OWN_SCREEN)
    try:
        yield
    finally:
        sys.stdout.write(USUAL_SCREEN)
        sys.stdout.flush()


@contextlib.contextmanager
def pressed_keys() -> Iterator[int | None]:
    """Yield the descriptor of the keyboard, whose keys come without Enter inside the block; None if there is none."""
    try:
        import termios
        import tty

        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (ImportError, OSError, ValueError, termios.error):
        yield None
        return
    try:
        tty.setcbreak(keyboard)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
