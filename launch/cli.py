"""The command ``mgpu-launch``. Commands import what they need when they run, so ``--help`` is instant."""

import errno
import io
import os
import sys

import click

import mgpu
from mgpu.launch.installed import PLANNING, SERVING
from mgpu.launch.lazy_group import LazyGroup
from mgpu.launch.pages.help import WIDTH
from mgpu.launch.settings import peer_names
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.signals import end_first_process_at_sigterm

PROGRAM = "mgpu-launch"
EXIT_USAGE = 64
"""A mistake on the command line; systemd does not restart after it."""

EXIT_OUTPUT = 74
"""EX_IOERR."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

COMMANDS = {
    "serve": "mgpu.launch.commands.serve:serve_command",
    "plan": "mgpu.launch.commands.plan:plan_command",
    "generate": "mgpu.launch.commands.talk.generate:generate_command",
    "chat": "mgpu.launch.commands.talk.chat:chat_command",
    "status": "mgpu.launch.commands.talk.status:status_command",
    "top": "mgpu.launch.commands.talk.top:top_command",
    "route": "mgpu.launch.commands.route:route_command",
    "roll": "mgpu.launch.commands.roll:roll_command",
    "http": "mgpu.launch.commands.http:http_command",
    "doctor": "mgpu.launch.commands.doctor:doctor_command",
    "bench": "mgpu.launch.bench:bench_group",
    "config": "mgpu.launch.commands.show_config:config_command",
    "keygen": "mgpu.launch.commands.install.keygen:keygen_command",
    "completion": "mgpu.launch.commands.install.completion:completion_command",
    "man": "mgpu.launch.commands.install.man:man_command",
    "install-service": "mgpu.launch.commands.install.install_service:install_service_command",
    "demo": "mgpu.launch.commands.demo:demo_command",
}
NEEDS = {
    "serve": SERVING,
    "route": SERVING,
    "plan": PLANNING,
    "bench": SERVING,
    "install-service": SERVING,
    "demo": SERVING,
    "doctor": PLANNING,
}


@click.group(
    cls=LazyGroup,
    homes=COMMANDS,
    hints=peer_names.COMMANDS,
    needs=NEEDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
    invoke_without_command=True,
    no_args_is_help=True,
)
@click.option("--version", "shows_version", is_flag=True, help="Show the version; -v adds torch, CUDA and others.")
@click.option("-v", "--verbose", is_flag=True, help="With --version: torch, CUDA, NCCL, driver, commit.")
@click.pass_context
def cli(ctx: click.Context, shows_version: bool, verbose: bool) -> None:
    """Serve one large language model on all GPUs of this machine."""
    if shows_version:
        click.echo(f"{PROGRAM}, version {mgpu.__version__}")
        if verbose:
            from mgpu.launch.pages.versions import version_text

            click.echo(version_text())
        ctx.exit()
    if ctx.invoked_subcommand is None:
        raise click.UsageError("Missing command.", ctx)


def main() -> None:
    """Run the command line; a user's mistake ends in one message and a non-zero status, never in a traceback."""
    open_standard_files()
    end_first_process_at_sigterm()
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer may hold characters that the terminal lacks
        sys.stdout.reconfigure(errors="replace")
    try:
        status = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.UsageError as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries to write the rest again when it exits
        click.echo(f"error: cannot write everything: {error}; make room where the output goes", err=True)
        sys.exit(EXIT_OUTPUT)


def open_standard_files() -> None:
    """Open /dev/null for a standard file that is closed: else a socket gets its number, and logs go into the socket."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number, this one
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115 (they stay open, like those that Python opens)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115


if __name__ == "__main__":
    main()
