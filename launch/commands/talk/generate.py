"""``mgpu-launch generate "prompt"``: continue a text with the running server."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from mgpu.launch.commands.talk.options import print_pieces, server_errors, talk_options, typed
from mgpu.launch.completion import complete_file
from mgpu.launch.pages.help import Command
from mgpu.orchestrator.errors import UserError
from mgpu.protocol.client.client import Client
from mgpu.protocol.client.requests.results import Piece

MOST_TOKENS = 512
"""Without --max-tokens a text ends here: a model that only continues it may never stop by itself."""


@click.command(
    "generate",
    cls=Command,
    short_help="Continue a text.",
    examples=(
        "mgpu-launch generate 'Once upon a time' --max-tokens 64",
        "mgpu-launch generate - --temperature 0.7 < prompt.txt",
        "mgpu-launch generate 'A person: ' --json-schema person.json",
    ),
)
@click.argument("words", nargs=-1, required=True, metavar="PROMPT")
@talk_options(f"[default: {MOST_TOKENS}]")
@click.option("--stop", multiple=True, help="End the answer before this text; may be repeated.")
@click.option("--json-schema", metavar="FILE", shell_complete=complete_file, help="The answer is JSON of this schema.")
def generate_command(
    words: tuple[str, ...],
    endpoint: str | None,
    keys: str | None,
    timeout: float,
    stop: tuple[str, ...],
    json_schema: str | None,
    **sampling: Any,
) -> None:
    """Continue PROMPT and print the text as it arrives; "-" reads the prompt from standard input.

    Without --max-tokens the answer stops after 512 tokens.
    """
    if len(words) > 1:
        raise click.UsageError(f"{len(words)} words, but PROMPT is one: put it in quotes, such as 'Once upon a time'")
    [prompt] = words
    text = _utf8("standard input", _read_input()) if prompt == "-" else _utf8("PROMPT", prompt)
    schema = None if json_schema is None else _read_schema(json_schema)
    options = typed({**sampling, "stop": list(stop) or None, "json_schema": schema})
    with (
        server_errors(),
        Client(endpoint, timeout_s=timeout, keys=keys) as client,
        client.stream(text, **options) as pieces,
    ):
        print_pieces(pieces if "max_tokens" in options else stopped(pieces))
    click.echo()


def stopped(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield pieces up to `MOST_TOKENS` tokens, and say so if more would come."""
    left = MOST_TOKENS
    for piece in pieces:
        yield piece
        left -= len(piece.token_ids)
        if left <= 0 and piece.finish_reason is None:
            click.echo(f" [stopped after {MOST_TOKENS} tokens; --max-tokens allows more]", err=True, nl=False)
            return


def _utf8(what: str, text: str) -> str:
    """Return the text. UserError if it holds bytes that are not UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is no UTF-8 text at character {error.start + 1}; convert it, for example with: iconv -f LATIN1 "
            "-t UTF-8"
        ) from None
    return text


def _read_schema(path: str) -> str:
    """Return the text of a file. UserError if it cannot be read or is too long; the server reads what it says."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json-schema {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--json-schema {path}: not a UTF-8 text") from None
    if not text.strip():
        raise UserError(f'--json-schema {path}: the file is empty; {{"type": "object"}} is the simplest schema')
    return text


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is no {error.encoding} text from byte {error.start} on ({error.reason}); convert it, for "
            "example with: iconv -f LATIN1 -t UTF-8"
        ) from None
