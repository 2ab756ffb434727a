"""What `bench/performance` asks of mgpu: one server per part, and all of the table that this server can tell."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.options import Sizes
from bench.performance.rows import (
    BENCH,
    BURST,
    BURST_TOKENS,
    DECODE,
    FAILED,
    FIRST_TOKEN,
    IDLE,
    PREFILL,
    READY,
    SHOWN,
    TOKENS_PER_S,
    Effort,
    missing,
    row,
)  # fmt: skip
from mgpu.launch.bench.decode import cannot_run
from mgpu.launch.bench.idle import SETTLE_S, idle_share
from mgpu.launch.bench.options import Wanted
from mgpu.launch.bench.probe import NotMeasured, Probe
from mgpu.launch.bench.report import Report, Row, spread
from mgpu.launch.bench.step import breakdown
from mgpu.launch.bench.target import READY_S, SILENCE_S, TIMEOUT_S, Target, prepared
from mgpu.launch.server_process import ServerDied
from mgpu.orchestrator.errors import UserError
from mgpu.protocol.client.client import Client
from mgpu.protocol.errors import MgpuError

FIRST_TOKENS = 10
"""A first token takes milliseconds: it is asked for this many times as often as the rest."""
IDLE_S = 2.0
REHEARSAL_OPTIONS = ("--device", "cpu", "--kv-memory", "64MiB")


@dataclass(frozen=True, slots=True)
class Part:
    """One server, and what is asked of it: numbers of requests with lengths of prompts."""

    shape: str
    decode: Sizes
    options: tuple[str, ...] = ()
    prefill: Sizes = ()
    bursts: Sizes = ()
    first_token: int = 0
    """Length of the prompt; 0: not asked."""
    idles: bool = False
    late_decode: Sizes = ()
    """What fills the cache with long prompts, and therefore comes last."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how parts are measured."""

    effort: Effort
    bandwidth: str
    options: tuple[str, ...]
    """For every server, from the command line."""
    folder: Path
    """For models."""

    @property
    def facts(self) -> dict[str, object]:
        """Return what is saved beside the numbers."""
        return {"more_options": list(self.options)}

    def wanted(self, model: Path, options: tuple[str, ...] = ()) -> Wanted:
        """Say it as `mgpu-launch bench` would understand it."""
        more = REHEARSAL_OPTIONS if self.effort.is_rehearsal else ()
        return Wanted(str(model), "", self.bandwidth, self.effort.repeat, None, (*more, *options, *self.options))


def measure(part: Part, place: Place, model: Path, save: Path) -> None:
    """Start the part's server and ask it everything; rows are saved as they come. UserError if it cannot be started."""
    with prepared(place.wanted(model, part.options)) as target:
        report = Report(BENCH, "mgpu", SHOWN, save, "triton", "pyzmq", shape=part.shape, **place.facts, **target.facts)
        with failures_noted(report):
            began_s = time.perf_counter()
            with target.start() as server:
                endpoint = server.wait_ready(READY_S)
                report.add(row(READY, 0, 0, "s", [time.perf_counter() - began_s]))
                if part.idles:
                    report.add(_idle(server.process.pid, place.effort))
                with Client(endpoint, timeout_s=TIMEOUT_S, silence_timeout_s=SILENCE_S) as client:
                    _Asked(client, target, place.effort, report).ask(part)


@contextmanager
def failures_noted(report: Report) -> Iterator[None]:
    """Put the failure of a server into the table, where what it did not answer will be missing."""
    try:
        yield
    except (ServerDied, UserError, MgpuError) as error:
        report.add(missing(FAILED, 0, 0, f"{type(error).__name__}: {error}"))


def _idle(pid: int, effort: Effort) -> Row:
    time.sleep(SETTLE_S)
    return row(IDLE, 0, 0, "share", [idle_share(pid, IDLE_S) for _ in range(effort.repeat)])


class _Asked:
    """One running server under the questions of a part."""

    def __init__(self, client: Client, target: Target, effort: Effort, report: Report) -> None:
        self.target = target
        self.effort = effort
        self.report = report
        vocab_size = target.plan.facts.vocab_size
        self.fresh = Probe(client, vocab_size)
        self.decoding = Probe(client, vocab_size, seed=1, repeats_prompts=True)

    def ask(self, part: Part) -> None:
        effort = self.effort
        for batch, context in part.decode:
            self._decode(batch, context)
        if part.first_token:
            self._measure(
                FIRST_TOKEN, 1, part.first_token, "ms", lambda size: self.fresh.first_token_s(size) * 1e3, FIRST_TOKENS
            )
        for count, length in part.prefill:
            self._measure(PREFILL, count, length, TOKENS_PER_S, partial(self.fresh.prefill_rate, effort.size(count)))
        for count, length in part.bursts:
            burst = partial(self.fresh.closed_loop, effort.size(count), new_tokens=effort.size(BURST_TOKENS))
            self._measure(BURST, count, length, TOKENS_PER_S, burst, warm_up=False)
        for batch, context in part.late_decode:
            self._decode(batch, context)

    def _measure(
        self, what: str, count: int, length: int, unit: str, run: Callable[[int], float], times: int = 1,
        warm_up: bool = True,
    ) -> None:  # fmt: skip
        """Add a row of runs of ``run``, which takes the tokens of a prompt."""
        tokens = self.effort.size(length)
        if tokens + 1 > self.fresh.max_seq_len:
            note = f"left out: the server's context has {self.fresh.max_seq_len} tokens"
            self.report.add(missing(what, count, length, note))
            return
        if warm_up:
            run(tokens)
        self.report.add(row(what, count, length, unit, [run(tokens) for _ in range(times * self.effort.repeat)]))

    def _decode(self, batch: int, context: int) -> None:
        """Add a row of decoding, with the limit of its mean context, and what the workers waited meanwhile."""
        rows, tokens = self.effort.size(batch), self.effort.size(context)
        if problem := cannot_run(rows, tokens, self.target.config.max_rows, self.decoding.kv_tokens):
            self.report.add(missing(DECODE, batch, context, problem))
            return
        try:
            self.decoding.decode(rows, tokens, 0.0)  # the first use of a batch size makes its graph
            runs = [self.decoding.decode(rows, tokens, self.effort.seconds) for _ in range(self.effort.repeat)]
            steps = [breakdown(run) for run in runs]
        except NotMeasured as problem:
            self.report.add(missing(DECODE, batch, context, str(problem)))
            return
        found = row(DECODE, batch, context, TOKENS_PER_S, [run.tokens_per_s for run in runs])
        context_then = statistics.median(run.mean_context for run in runs)
        for name in steps[0]:
            found |= spread(name, [step[name] for step in steps])
        rate = statistics.median(run.tokens_per_s for run in runs)
        limit = self.target.limit.tokens_per_s(rows, context_then)
        share = rate / limit if limit else None
        self.report.add(found | {"mean_context": context_then, "limit": limit, "share": share})
