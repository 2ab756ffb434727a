"""One server and its honest clients, attacked again and again."""

import json
import math
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

from bench.attack.honest import Honest, Window
from bench.attack.row import GROWTH_BYTES, GROWTH_DESCRIPTORS, Row
from bench.attack.situations import Situation
from bench.attack.victim import HOSTILE, Footprint, Transport, Victim, undisturbed

MOST_ATTACKS = 120
"""On tcp each has a key of its own, so that what one has earned is not held against the next."""


class Siege:
    """A server, ``streams`` honest streams and a prober; a context manager.

    They are kept to all cores but the last, which attackers have, if there are two or more.
    """

    def __init__(self, model: str, transport: Transport, situation: Situation, streams: int) -> None:
        self._all = sorted(os.sched_getaffinity(0))
        ours, self._core = (set(self._all[:-1]), self._all[-1]) if len(self._all) > 1 else (set(self._all), -1)
        self._ours = ours
        self._transport = transport
        self._victim = Victim(model, transport, ours, MOST_ATTACKS, situation)
        self._streams = streams
        self._stack = ExitStack()
        self._num_attacks = 0
        self._calms: list[Window] = []

    @property
    def lives(self) -> bool:
        return self._victim.lives and self._num_attacks < MOST_ATTACKS

    def __enter__(self) -> "Siege":
        with ExitStack() as stack:
            stack.enter_context(self._victim)
            self._honest = stack.enter_context(
                Honest(self._victim, undisturbed(self._victim, self._streams), self._streams)
            )
            stack.callback(os.sched_setaffinity, 0, set(self._all))
            os.sched_setaffinity(0, self._ours)
            self._honest.warm_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, name: str, strength: int, seconds: float, calm_s: float) -> Row:
        """Watch the honest clients for ``calm_s`` without an attack, then with it, and see what it leaves behind."""
        row = Row(name, self._transport, strength, load=os.getloadavg()[0])
        honest, victim = self._honest, self._victim
        victim.wait_quiet(self._streams + 1)
        before = self._calm(calm_s)
        held, restarts, lost, different = victim.footprint(), victim.restarts(), honest.lost, honest.different
        during = self._attacked(row, seconds)
        honest.watch(1.0)
        _compare(row, victim, (before, during), (held, restarts), seconds)
        row.lost, row.different = honest.lost - lost, honest.different - different
        row.judge()
        return row

    def _calm(self, seconds: float) -> Window:
        """Watch without an attack, and return what is usual in this run: some seconds alone are often unusual ones."""
        calms = self._calms
        calms += [self._honest.watch(seconds) for _ in range(1 if calms else 2)]
        rate = statistics.median(each.tokens_per_s for each in calms)
        first = [first_s for each in calms for first_s in each.first_token_s]
        return Window(seconds=1.0, tokens=round(rate), first_token_s=first)

    def _attacked(self, row: Row, seconds: float) -> Window:
        key = self._victim.key_file(f"{HOSTILE}{self._num_attacks}")
        self._num_attacks += 1
        words = [row.attack, self._victim.endpoint, str(seconds), str(row.strength), str(self._core)]
        attacker = subprocess.Popen(
            [sys.executable, "-m", "bench.attack.attacker", *words, *([str(key)] if key else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            window = self._honest.watch(seconds)
            output, errors = attacker.communicate(timeout=60)
            if attacker.returncode:
                row.problems.append(f"the attacker failed: {errors.decode(errors='replace').strip()[-300:]}")
            else:
                row.cost = json.loads(output)
        except subprocess.TimeoutExpired:
            row.problems.append("the attacker did not end")
        finally:
            attacker.kill()
            attacker.wait()
        row.problems += window.problems[:5]
        return window


def _compare(
    row: Row, victim: Victim, windows: tuple[Window, Window], held: tuple[Footprint, tuple[int, int]], seconds: float
) -> None:
    if not victim.lives:
        tail = victim.log.read_text(errors="replace")[-400:]
        row.problems.append(f"the server has ended with status {victim.server.process.returncode}: {tail}")
        return
    (before, during), (footprint, restarts) = windows, held
    after = victim.settled(footprint, GROWTH_BYTES, GROWTH_DESCRIPTORS)
    row.gateways, row.counted_restarts = (now - then for now, then in zip(victim.restarts(), restarts, strict=True))
    row.first_token_ratio = _ratio(during.median_first_token_s, before.median_first_token_s)
    row.worst_first_token_ratio = _ratio(during.worst_first_token_s, before.worst_first_token_s)
    row.rate_ratio = _ratio(during.tokens_per_s, before.tokens_per_s)
    row.log_bytes_per_s = (after.log_bytes - footprint.log_bytes) / seconds
    row.grown_bytes = max(0, after.rss_bytes - footprint.rss_bytes)
    row.grown_descriptors = max(0, after.descriptors - footprint.descriptors)


def _ratio(during: float, before: float) -> float:
    """Return a ratio that is not a number where there was nothing to compare with: the machine was too busy."""
    return during / before if before else math.nan
