"""Counters and times of the engine, for the stats query."""

import time
from bisect import bisect_left
from collections import deque
from dataclasses import asdict

from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.orchestrator.scheduler.window_pages import WindowPages
from mgpu.protocol.internal.histogram import LONG_S, Histogram

_SMOOTHING = 0.02
RATE_WINDOW_S = 5.0
RATE_SAMPLE_S = 0.25
STEP_BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Average:
    """Exponential moving average, over about the last fifty values, and the sum of all of them."""

    def __init__(self) -> None:
        self.value = 0.0
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.sum += value
        self.value += (value - self.value) * (_SMOOTHING if self.value else 1.0)


class StepTime(Average):
    """Average and cumulative histogram of the time from publishing a step to its result."""

    def __init__(self) -> None:
        super().__init__()
        self.buckets = [0] * (len(STEP_BUCKETS_MS) + 1)

    def add(self, value: float) -> None:
        super().add(value)
        self.buckets[bisect_left(STEP_BUCKETS_MS, value / 1000)] += 1


class RecentRate:
    """How fast a total grows, over the last seconds.

    The last total is always known; of older ones a few per second are kept, so that noting one is cheap.
    Example: 50 at 5 s and nothing older, asked at 10 s with a total of 60: 10 in 5 s, so 2.0 per second.
    """

    def __init__(self, started_s: float) -> None:
        self._totals = deque([(started_s, 0)])

    def note(self, now_s: float, total: int) -> None:
        """Keep the total of now, and drop what is older than the window needs."""
        if len(self._totals) > 1 and now_s - self._totals[-2][0] < RATE_SAMPLE_S:
            self._totals[-1] = (now_s, total)
            return
        self._totals.append((now_s, total))
        while len(self._totals) > 1 and self._totals[1][0] <= now_s - RATE_WINDOW_S:
            self._totals.popleft()

    def per_second(self, now_s: float, total: int) -> float:
        """Return the growth per second since the newest total that is `RATE_WINDOW_S` old, or since the first."""
        base_s, base = self._totals[0]
        for at_s, kept in self._totals:
            if at_s > now_s - RATE_WINDOW_S:
                break
            base_s, base = max(at_s, now_s - RATE_WINDOW_S - RATE_SAMPLE_S), kept
        return (total - base) / (now_s - base_s) if now_s > base_s else 0.0


class EngineStats:
    """Averages and sums in µs. Other counters are counted where the things happen."""

    def __init__(self) -> None:
        self.schedule_us = Average()
        self.publish_us = Average()
        self.apply_us = Average()
        self.compute_us = Average()
        self.step_us = StepTime()
        self.queue_s = Histogram(LONG_S)
        """How long sequences have waited until their first step went out."""
        self.starved_us_sum = 0.0
        """How long the workers had no step in flight although something was running."""
        self._dry_since_s: float | None = None
        self._started_s = time.monotonic()
        self._generated = RecentRate(self._started_s)
        self._prompts = RecentRate(self._started_s)

    def note_tokens(self, now_s: float, generated: int, prompts: int) -> None:
        """Note the totals of generated tokens and of prompt tokens after a step."""
        self._generated.note(now_s, generated)
        self._prompts.note(now_s, prompts)

    def note_dry(self, now_s: float) -> None:
        """Note that the last step in flight has come back while something runs."""
        self._dry_since_s = now_s

    def note_idle(self) -> None:
        """Note that nothing runs, so the workers lack nothing."""
        self._dry_since_s = None

    def note_fed(self, now_s: float) -> None:
        """Note that a step goes out when none is in flight."""
        if self._dry_since_s is not None:
            self.starved_us_sum += (now_s - self._dry_since_s) * 1e6
            self._dry_since_s = None

    def counters(self, scheduler: Scheduler, last_step_age_s: float) -> dict[str, float]:
        """Return every counter under the name that clients see."""
        blocks, totals, now_s = scheduler.blocks.pool, scheduler.counters, time.monotonic()
        values: dict[str, float] = {
            "running": scheduler.num_running,
            "waiting": scheduler.num_live - scheduler.num_running,
            "steps_in_flight": scheduler.num_in_flight,
            "last_step_age_s": last_step_age_s,
            "kv_blocks_total": blocks.num_blocks,
            "kv_blocks_used": blocks.num_blocks - blocks.num_free,
            **_pages(scheduler.blocks.pages),
            **asdict(totals),
            "tokens_per_s": self._generated.per_second(now_s, totals.generated_tokens),
            "prompt_tokens_per_s": self._prompts.per_second(now_s, totals.prompt_tokens),
            "uptime_s": now_s - self._started_s,
            "step_us": self.step_us.value,
            "step_ms_sum": self.step_us.sum / 1000,
            "starved_us_sum": self.starved_us_sum,
            **self.queue_s.counters("queue_s"),
        }
        for part in ("schedule_us", "publish_us", "apply_us", "compute_us"):
            average: Average = getattr(self, part)
            values[part], values[f"{part}_sum"] = average.value, average.sum
        count = 0
        for bound, steps in zip((*STEP_BUCKETS_MS, "inf"), self.step_us.buckets, strict=True):
            count += steps
            values[f"step_ms_le_{bound}"] = count
        return {name: float(value) for name, value in values.items()}


def _pages(pages: WindowPages | None) -> dict[str, float]:
    """Return what is held of the pool of layers with windows, if they have one."""
    if pages is None:
        return {}
    return {"window_pages_total": pages.num_pages, "window_pages_used": pages.num_pages - pages.num_free}
