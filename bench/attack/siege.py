"""One server and its honest clients, attacked again and again."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

from bench.attack.honest import Honest, Window
from bench.attack.row import GROWTH_BYTES, GROWTH_DESCRIPTORS, Row
from bench.attack.situations import Situation
from bench.attack.victim import HOSTILE, Footprint, Transport, Victim, undisturbed

Calms = list[Window]
MOST_ATTACKS = 120
"""On tcp each has a key of its own, so that what one has earned is not held against the next."""


class Siege:
    """A server, ``streams`` honest streams and a prober; a context manager.

    They are kept to all cores but the last, which attackers have, if there are two or more. Where the server has HTTP,
    half of the streams are there, with a prober of their own.
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
        self._honest: list[Honest] = []
        self._calms: list[Calms] = []
        """Of each of these, what it saw without an attack so far."""

    @property
    def lives(self) -> bool:
        return self._victim.lives and self._num_attacks < MOST_ATTACKS

    def __enter__(self) -> "Siege":
        with ExitStack() as stack:
            stack.enter_context(self._victim)
            speakers = self._victim.speakers()
            expected = [undisturbed(connect, self._streams) for connect in speakers]
            for connect, answers in zip(speakers, expected, strict=True):
                self._honest.append(stack.enter_context(Honest(connect, answers, self._streams // len(speakers))))
                self._calms.append([])
            stack.callback(os.sched_setaffinity, 0, set(self._all))
            os.sched_setaffinity(0, self._ours)
            for honest in self._honest:
                honest.warm_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, name: str, strength: int, seconds: float, calm_s: float) -> Row:
        """Watch the honest clients for ``calm_s`` without an attack, then with it, and see what it leaves behind."""
        row = Row(name, self._transport, strength, load=os.getloadavg()[0])
        victim = self._victim
        victim.wait_quiet(self._streams + len(self._honest))
        before = self._calm(calm_s)
        held, restarts, (lost, different) = victim.footprint(), victim.restarts(), self._losses()
        during = self._attacked(row, seconds)
        self._watch(1.0)
        _compare(row, victim, list(zip(before, during, strict=True)), (held, restarts), seconds)
        now_lost, now_different = self._losses()
        row.lost, row.different = now_lost - lost, now_different - different
        row.judge()
        return row

    def _losses(self) -> tuple[int, int]:
        """Return how many streams were lost, and how many different, so far."""
        return sum(each.lost for each in self._honest), sum(each.different for each in self._honest)

    def _watch(self, seconds: float) -> list[Window]:
        """Let ``seconds`` pass and return what each group of honest clients saw meanwhile."""
        windows = [each.begin() for each in self._honest]
        time.sleep(seconds)
        return [each.end(window) for each, window in zip(self._honest, windows, strict=True)]

    def _calm(self, seconds: float) -> list[Window]:
        """Watch without an attack, and return what is usual in this run: some seconds alone are often unusual ones."""
        for _ in range(1 if self._calms[0] else 2):
            for calms, window in zip(self._calms, self._watch(seconds), strict=True):
                calms.append(window)
        return [_usual(calms) for calms in self._calms]

    def _attacked(self, row: Row, seconds: float) -> list[Window]:
        endpoint, key = self._victim.target(f"{HOSTILE}{self._num_attacks}")
        self._num_attacks += 1
        words = [row.attack, endpoint, str(seconds), str(row.strength), str(self._core)]
        attacker = subprocess.Popen(
            [sys.executable, "-m", "bench.attack.attacker", *words, *([str(key)] if key else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            windows = self._watch(seconds)
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
        row.problems += [problem for window in windows for problem in window.problems[:5]]
        return windows


def _usual(calms: Calms) -> Window:
    rate = statistics.median(each.tokens_per_s for each in calms)
    first = [first_s for each in calms for first_s in each.first_token_s]
    return Window(seconds=1.0, tokens=round(rate), first_token_s=first)


def _compare(
    row: Row,
    victim: Victim,
    windows: list[tuple[Window, Window]],
    held: tuple[Footprint, tuple[int, int]],
    seconds: float,
) -> None:
    """Note what changed between the windows before and during the attack; of several pairs, the worst."""
    if not victim.lives:
        tail = victim.log.read_text(errors="replace")[-400:]
        row.problems.append(f"the server has ended with status {victim.server.process.returncode}: {tail}")
        return
    footprint, restarts = held
    after = victim.settled(footprint, GROWTH_BYTES, GROWTH_DESCRIPTORS)
    row.gateways, row.counted_restarts = (now - then for now, then in zip(victim.restarts(), restarts, strict=True))
    row.first_token_ratio = max(_ratio(now.median_first_token_s, then.median_first_token_s) for then, now in windows)
    row.worst_first_token_ratio = max(
        _ratio(now.worst_first_token_s, then.worst_first_token_s) for then, now in windows
    )
    row.rate_ratio = min(_ratio(now.tokens_per_s, then.tokens_per_s) for then, now in windows)
    row.log_bytes_per_s = (after.log_bytes - footprint.log_bytes) / seconds
    row.grown_bytes = max(0, after.rss_bytes - footprint.rss_bytes)
    row.grown_descriptors = max(0, after.descriptors - footprint.descriptors)


def _ratio(during: float, before: float) -> float:
    """Return a ratio that is not a number where there was nothing to compare with: the machine was too busy."""
    return during / before if before else math.nan
