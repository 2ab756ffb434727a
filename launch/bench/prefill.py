"""``mgpu-launch bench prefill``: prompt tokens per second, and the time to a first token on an idle server."""

import click

from mgpu.launch.bench.decode import cannot_run
from mgpu.launch.bench.options import Sizes, Wanted, target_options
from mgpu.launch.bench.options import sizes as read_sizes
from mgpu.launch.bench.probe import Probe
from mgpu.launch.bench.report import Report, spread
from mgpu.launch.bench.target import prepared, probing

SHOWN = ("prompts", "length", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "ms")
FIRST_TOKEN_ASKS = 5
"""A single prompt is short: it is asked this many times as often."""


@click.command("prefill", short_help="Process prompts, one new token each.")
@target_options
@click.option(
    "--sizes",
    metavar="COUNTxLENGTH,…",
    callback=read_sizes,
    default="1x128,32x1024,4x8192",
    show_default=True,
    help="Prompts that come at once.",
)
def prefill_command(wanted: Wanted, sizes: Sizes) -> None:
    """Process prompts of random tokens that come at once, one new token each.

    With one prompt, ``ms`` is the time to its first token on an idle server.
    """
    with prepared(wanted) as target, probing(target) as probe:
        report = Report("prefill", "mgpu", SHOWN, wanted.save, "pyzmq", "triton", **target.facts)
        for count, length in sizes:
            problem = cannot_run(1, length, target.config.max_rows, probe.kv_tokens)
            if length + 1 > probe.max_seq_len:
                problem = f"left out: the server's context has {probe.max_seq_len} tokens"
            if problem:
                report.add({"prompts": count, "length": length, "note": problem})
                continue
            seconds = prefill_seconds(probe, count, length, wanted.repeat)
            rates = spread("tokens_per_s", [count * length / each for each in seconds])
            report.add({"prompts": count, "length": length} | rates | spread("ms", [each * 1e3 for each in seconds]))


def prefill_seconds(probe: Probe, count: int, length: int, repeat: int) -> list[float]:
    """Return the seconds of every run, after one that warms up."""
    if count == 1:
        probe.first_token_s(length)
        return [probe.first_token_s(length) for _ in range(FIRST_TOKEN_ASKS * repeat)]
    probe.prefill_rate(count, length)
    return [count * length / probe.prefill_rate(count, length) for _ in range(repeat)]
