"""Counters and times of the engine, for the stats query."""

import time
from bisect import bisect_left
from dataclasses import asdict

from mgpu.orchestrator.scheduler.scheduler import Scheduler

_SMOOTHING = 0.02
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


class EngineStats:
    """Averages and sums in µs. Other counters are counted where the things happen."""

    def __init__(self) -> None:
        self.schedule_us = Average()
        self.publish_us = Average()
        self.apply_us = Average()
        self.compute_us = Average()
        self.step_us = StepTime()
        self.starved_us_sum = 0.0
        """How long the workers had no step in flight although something was running."""
        self._dry_since_s: float | None = None
        self._started_s = time.monotonic()

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
        blocks = scheduler.blocks.pool
        values: dict[str, float] = {
            "running": scheduler.num_running,
            "waiting": scheduler.num_live - scheduler.num_running,
            "steps_in_flight": scheduler.num_in_flight,
            "last_step_age_s": last_step_age_s,
            "kv_blocks_total": blocks.num_blocks,
            "kv_blocks_used": blocks.num_blocks - blocks.num_free,
            **asdict(scheduler.counters),
            "uptime_s": time.monotonic() - self._started_s,
            "step_us": self.step_us.value,
            "starved_us_sum": self.starved_us_sum,
        }
        for part in ("schedule_us", "publish_us", "apply_us", "compute_us"):
            average: Average = getattr(self, part)
            values[part], values[f"{part}_sum"] = average.value, average.sum
        count = 0
        for bound, steps in zip((*STEP_BUCKETS_MS, "inf"), self.step_us.buckets, strict=True):
            count += steps
            values[f"step_ms_le_{bound}"] = count
        return {name: float(value) for name, value in values.items()}
