"""``mgpu-launch bench decode``: tokens per second by batch and context, beside what memory allows."""

import statistics

import click

from mgpu.launch.bench.limit import Limit
from mgpu.launch.bench.options import Wanted, list_option, seconds_option, target_options
from mgpu.launch.bench.probe import NotMeasured, Probe
from mgpu.launch.bench.report import Report, Row, spread
from mgpu.launch.bench.target import prepared, probing

SHOWN = ("batch", "context", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "limit", "share")


@click.command("decode")
@target_options
@list_option("--batches", "1,2,4,8,16,32,64,128,256", "Streams that decode at once.")
@list_option("--contexts", "128,1024,8192", "Tokens of each prompt.")
@seconds_option(1.0, "Seconds that each run is counted.")
def decode_command(wanted: Wanted, batches: tuple[int, ...], contexts: tuple[int, ...], seconds: float) -> None:
    """Decode with 1 to 256 streams at several contexts.

    The engine counts tokens while the whole batch decodes. The limit is that of the mean context in that time.
    """
    with prepared(wanted) as target, probing(target) as probe:
        report = Report("decode", "mgpu", SHOWN, wanted.save, "pyzmq", "triton", seconds=seconds, **target.facts)
        for context in contexts:
            for batch in batches:
                if problem := cannot_run(batch, context, target.config.max_rows, probe.kv_tokens):
                    report.add({"batch": batch, "context": context, "note": problem})
                    continue
                report.add(decode_row(probe, target.limit, batch, context, seconds, wanted.repeat))


def cannot_run(batch: int, context: int, max_rows: int, kv_tokens: int) -> str:
    """Say why a batch cannot decode as a whole; empty if it can."""
    if batch > max_rows:
        return f"left out: the server runs {max_rows} requests at once (-- --max-rows {batch})"
    if batch * (context + 2) > kv_tokens:
        return f"left out: {batch} x {context} tokens do not fit into the KV cache of {kv_tokens:,}"
    return ""


def decode_row(probe: Probe, limit: Limit, batch: int, context: int, seconds: float, repeat: int) -> Row:
    """Measure one cell of the table; what could not be measured says so in its note."""
    row: Row = {"batch": batch, "context": context}
    try:
        probe.decode_rate(batch, context, 0.0)  # the first use of a batch size makes its graph
        runs = [probe.decode_rate(batch, context, seconds) for _ in range(repeat)]
    except NotMeasured as problem:
        return row | {"note": str(problem)}
    rates, middles = zip(*runs, strict=True)
    row |= spread("tokens_per_s", rates) | {"mean_context": statistics.median(middles), "repeats": repeat}
    most = limit.tokens_per_s(batch, statistics.median(middles))
    share = statistics.median(rates) / most if most else None
    return row | {"limit": most, "share": share}
