"""``mgpu-launch bench``: what one server does, measured from outside."""

import click

from mgpu.launch.lazy_group import LazyGroup

BENCHES = {
    "decode": "mgpu.launch.bench.decode:decode_command",
    "prefill": "mgpu.launch.bench.prefill:prefill_command",
    "serve": "mgpu.launch.bench.serve:serve_bench_command",
    "startup": "mgpu.launch.bench.startup:startup_command",
    "step": "mgpu.launch.bench.step:step_command",
    "idle": "mgpu.launch.bench.idle:idle_command",
}


@click.group(
    "bench",
    cls=LazyGroup,
    homes=BENCHES,
    short_help="Measure speed.",
    epilog="Options after -- go to serve: mgpu-launch bench decode --shape 8B -- --max-rows 64",
)
def bench_group() -> None:
    """Measure speed: start a server, ask it through its front channel, print a table.

    Without -m the model has random weights made in place: --shape 8B on GPUs, a tiny one on the CPU.
    """
