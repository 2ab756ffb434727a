"""``mgpu-launch demo``: serve the built-in model, stream one answer, stop everything."""

import signal
import time

import click

from mgpu.launch.commands.talk.options import ServerError, print_pieces, server_errors
from mgpu.launch.pages.help import Command
from mgpu.launch.server_process import ServerDied, ServerProcess, orderly_end
from mgpu.orchestrator.models.find import BUILT_IN_DEMO, resolve_model
from mgpu.orchestrator.placement.machine.devices import find_machine
from mgpu.protocol.client.client import Client

QUESTION = "Give me three tips for writing clear code."
CPU_WORKERS = 3
"""The model has 3 KV heads, so it splits over three workers, even on two cores."""


@click.command(
    "demo",
    cls=Command,
    short_help="Serve the built-in model and stream one answer.",
    examples=("mgpu-launch demo --question 'Why is the sky blue?'",),
)
@click.option("--question", default=QUESTION, show_default=True)
@click.option("--max-tokens", default=160, show_default=True)
def demo_command(question: str, max_tokens: int) -> None:
    """Serve the built-in model on the GPUs (else on three CPU workers), stream one answer, stop."""
    resolve_model(BUILT_IN_DEMO, report=lambda line: click.echo(line, err=True))
    arguments = ["-m", BUILT_IN_DEMO, "--max-seq-len", "2048"]
    if find_machine("auto").kind == "cpu":
        arguments += ["--device", "cpu", "--workers", str(CPU_WORKERS)]
    click.secho(f"$ mgpu-launch serve {' '.join(arguments)}", bold=True)
    try:
        with orderly_end(), ServerProcess(*arguments, quiet=False) as server:
            ask(server.wait_ready(), question, max_tokens)
            status = server.stop()
    except ServerDied as error:
        raise ServerError(str(error)) from error
    if status not in (0, -signal.SIGTERM):
        raise ServerError(f"the server did not stop well: its exit status is {status}")
    click.secho("everything stopped", bold=True)


def ask(endpoint: str, question: str, max_tokens: int) -> None:
    """Stream one chat answer to the screen, then print its speed."""
    click.secho(f"\n> {question}", bold=True)
    start_s = time.monotonic()
    with server_errors(), Client(endpoint) as client:
        messages = [{"role": "user", "content": question}]
        usage = print_pieces(client.stream_chat(messages, max_tokens=max_tokens))
    seconds = time.monotonic() - start_s
    assert usage is not None
    rate = usage.completion_tokens / seconds
    click.secho(f"\n\n{usage.completion_tokens} tokens in {seconds:.1f} s: {rate:.1f} tokens/s\n", bold=True)
