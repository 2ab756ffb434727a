"""``mgpu-launch chat``: talk to the running server. Ctrl-C ends the answer, not the program."""

import time
from typing import Any

import click

from mgpu.launch.commands.talk import print_pieces, server_errors, talk_options, typed
from mgpu.protocol.client.client import Client
from mgpu.protocol.client.results import Piece
from mgpu.protocol.errors import RequestFailed


@click.command("chat")
@talk_options
@click.option("--system", default="", help="A system message before the first turn.")
def chat_command(endpoint: str | None, keys: str | None, timeout: float, system: str, **sampling: Any) -> None:
    """Chat with the model. Ctrl-C ends an answer; Ctrl-D leaves."""
    with server_errors(), Client(endpoint, timeout_s=timeout, keys=keys) as client:
        model = client.models()[0]["name"]
        click.secho(f"{model} — Ctrl-C ends an answer, Ctrl-D leaves, /new starts over", dim=True, err=True)
        converse(client, system, typed(sampling))


def converse(client: Client, system: str, options: dict[str, Any]) -> None:
    """Read a line, stream the answer and remember both, until the end of input."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        line = _read_line()
        if line is None:
            return
        if line.strip() == "/new":
            messages = list(opening)
        elif line.strip():
            turn = {"role": "user", "content": line}
            said = answer(client, [*messages, turn], options)
            if said:  # a turn without an answer (refused, or stopped at once) is not part of the conversation
                messages += [turn, {"role": "assistant", "content": said}]


def _read_line() -> str | None:
    """Return the next line; None at the end of input. Ctrl-C at the prompt only clears the line."""
    while True:
        try:
            return input("> ")
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
