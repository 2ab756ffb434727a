"""``mgpu-launch generate "prompt"``: continue a text with the running server."""

import sys

import click

from mgpu.launch.talk import ServerError, given, print_pieces, talk_options
from mgpu.orchestrator.errors import UserError
from mgpu.protocol.client import Client
from mgpu.protocol.completion import MgpuError


@click.command("generate")
@click.argument("prompt")
@talk_options
@click.option("--stop", multiple=True, help="End the answer before this text; may be repeated.")
def generate_command(
    prompt: str,
    endpoint: str | None,
    keys: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    timeout: float,
    stop: tuple[str, ...],
) -> None:
    """Continue PROMPT and print the text as it arrives; "-" reads the prompt from standard input."""
    text = _read_input() if prompt == "-" else prompt
    options = given(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=list(stop) or None
    )
    try:
        with Client(endpoint, timeout_s=timeout, keys=keys) as client, client.stream(text, **options) as pieces:
            print_pieces(pieces)
    except MgpuError as error:
        raise ServerError(str(error)) from error
    click.echo()


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is no {error.encoding} text from byte {error.start} on ({error.reason}); convert it, for "
            "example with: iconv -f LATIN1 -t UTF-8"
        ) from None
