"""Faults on several devices: one rank killed under load, and what is left on GPUs when the parent is killed."""

import time
from collections.abc import Callable
from pathlib import Path

from bench.chaos.ends import kill_parents
from bench.chaos.kills import kill_decoding_workers, kill_idle_workers, kill_loading_workers, kill_workers_in_prompts
from bench.chaos.load import Streams, make_jobs, undisturbed
from bench.chaos.server import Server, ServerOptions
from bench.chaos.table import Row
from bench.model_shapes import SHAPES, SMALL_SHAPES, TINY, write_config, write_weights
from bench.multi_gpu.box import Box
from bench.multi_gpu.report import Report
from bench.waiting import wait_until

SECTION = "faults"
KILLS = {
    "decode": lambda server, streams: kill_decoding_workers(server, streams, 1),
    "prefill": lambda server, streams: kill_workers_in_prompts(server, streams, 1),
    "idle": lambda server, streams: kill_idle_workers(server, streams, 1),
    "load": lambda server, streams: kill_loading_workers(server, streams, 2),
}
RECOVERY_TARGET_S = 15.0
"""From the death of a rank of an 8B model to the group being ready again."""
STREAMS = 8
SMALL_VOCAB = 1003
KV_MEMORY = "1GiB"
MEMORY_S = 10.0
MEMORY_SLACK = 64 << 20
"""What a driver may keep for itself, or another process take meanwhile."""


def run(box: Box, report: Report, folder: Path) -> None:
    """Kill ranks of a small model, whose tokens must not change, then of the 8B shape, whose recovery is timed."""
    size = min(4, box.sizes[-1])
    tiny = write_weights(folder / "tiny", TINY)
    exact = _server_options(box, size, tiny, "--dtype", "float32")
    shape = (SMALL_SHAPES if box.kind == "cpu" else SHAPES)["8B"]
    big = write_config(folder / "8B", shape)
    timed = _server_options(box, size, big, "--load-format", "dummy")
    moments = ("decode", "load") if report.rehearsal else tuple(KILLS)
    asked = f"SIGKILL of a rank of {size}, small fp32"
    if report.has_time(SECTION, asked):
        with report.guard(SECTION, asked):
            _check_nothing_lost(report, f"{asked}: {', '.join(moments)}", _kill(exact, moments, 120, SMALL_VOCAB))
    asked = f"SIGKILL of a rank of {size}, 8B (random weights)"
    if report.has_time(SECTION, asked):
        with report.guard(SECTION, asked):
            _check_recovery(report, asked, _kill(timed, ("decode",) * (1 if report.rehearsal else 3), 120, SMALL_VOCAB))
    asked = f"SIGKILL of the parent of {size}, 8B"
    if report.has_time(SECTION, asked):
        with report.guard(SECTION, asked):
            _check_memory(box, report, asked, lambda: kill_parents(timed, 1))


def _server_options(box: Box, size: int, model: Path, *arguments: str) -> ServerOptions:
    place = box.first(size)
    by_size = () if box.kind == "gpus" else ("--tp", str(size))
    more = ("--max-seq-len", "512", *arguments, *place.options, *by_size)
    return ServerOptions(
        str(model), workers=None, hang_timeout_s=5.0, kv_memory=KV_MEMORY, more=more, environ=place.environ
    )


def _kill(server_options: ServerOptions, moments: tuple[str, ...], answer_tokens: int, vocab_size: int) -> Row:
    """Kill one rank per moment under load; every stream is compared with an undisturbed run of it."""
    row = Row("SIGKILL of a worker")
    with Server(server_options) as server:
        expected = undisturbed(server.endpoint, make_jobs(STREAMS + 4, answer_tokens, vocab_size=vocab_size))
        with Streams(server.endpoint, expected, STREAMS) as streams:
            for moment in moments:
                part = KILLS[moment](server, streams)
                row.seconds += part.seconds
                row.problems += part.problems
        row.add(streams.tally)
        return row


def _check_nothing_lost(report: Report, asked: str, row: Row) -> None:
    found = f"{row.finished} answers, {row.lost} lost, {row.repeated} repeated, {row.different} different"
    report.check(SECTION, asked, "nothing lost, tokens equal", found, row.is_good, "\n".join(row.problems))
    report.number(SECTION, f"{asked}: slowest recovery", max(row.seconds), "s")


def _check_recovery(report: Report, asked: str, row: Row) -> None:
    """Tokens in bf16 may depend on what else is in the batch, so only their number is judged."""
    found = f"{row.finished} answers, {row.lost} lost, {row.repeated} repeated"
    good = not (row.lost or row.repeated)
    report.check(SECTION, asked, "no token lost", found, good, "\n".join(row.problems))
    report.number(SECTION, f"{asked}: slowest recovery", max(row.seconds), "s", most=RECOVERY_TARGET_S)


def _check_memory(box: Box, report: Report, asked: str, kill: Callable[[], Row]) -> None:
    """Compare what the driver says of each GPU before the server and after its parent was killed."""
    before = box.used_bytes()
    row = kill()
    found = "nothing left" if row.is_good else "; ".join(row.problems)
    report.check(SECTION, asked, "no process, no file left", found, row.is_good)
    if not before:
        report.skip(SECTION, f"{asked}: GPU memory", "no GPU: NVML has nothing to say")
        return
    began_s = time.monotonic()

    def left() -> int:
        return max(used - before.get(uuid, 0) for uuid, used in box.used_bytes().items())

    is_free = wait_until(lambda: left() <= MEMORY_SLACK, MEMORY_S)
    found = f"at most {left() / 2**20:.0f} MiB more after {time.monotonic() - began_s:.1f} s"
    report.check(SECTION, f"{asked}: GPU memory", "as before", found, is_free)
