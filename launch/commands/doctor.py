"""``mgpu-launch doctor``: check this machine before a server is started on it."""

import json
from dataclasses import asdict

import click

from mgpu.launch.doctor.examine import examine
from mgpu.launch.doctor.finding import Finding, finding_text
from mgpu.launch.pages.help import Command
from mgpu.launch.server_process import orderly_end
from mgpu.protocol.internal.counted import counted


@click.command(
    "doctor",
    cls=Command,
    short_help="Check this machine: GPUs, NCCL, limits, folders.",
    examples=("mgpu-launch doctor", "mgpu-launch doctor --offline --json"),
)
@click.option("--offline", is_flag=True, help="Do not ask the hub.")
@click.option(
    "--timeout", type=click.FloatRange(1, 3600), default=120.0, show_default=True, metavar="SECONDS",
    help="What each try of torch and NCCL gets before it is killed.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor_command(offline: bool, timeout: float, as_json: bool) -> int:
    """Check driver, GPUs, NCCL, memory, limits and folders, and say what to do.

    Each line is ok, warn or FAIL. The exit status is 1 when one is FAIL. Servers need not be stopped.
    """
    found: list[Finding] = []
    with orderly_end():
        for finding in examine(offline, timeout):
            found.append(finding)
            if not as_json:
                click.echo(finding_text(finding))
    failures, warnings = (sum(each.level == level for each in found) for level in ("FAIL", "warn"))
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
    else:
        fine = len(found) - warnings - failures
        outcome = f"{fine} ok, {counted(warnings, 'warning')}, {counted(failures, 'failure')}"
        click.echo(f"\n{counted(len(found), 'check')}: {outcome}")
    return 1 if failures else 0
