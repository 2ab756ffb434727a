"""What the engine counts of its own time."""

import pytest

from mgpu.orchestrator.engine.stats import RATE_WINDOW_S, Average, EngineStats, RecentRate


def test_an_average_also_has_the_sum() -> None:
    average = Average()
    for value in (10.0, 20.0, 30.0):
        average.add(value)
    assert average.sum == 60.0
    assert 10.0 < average.value < 20.0


def test_workers_starve_from_the_last_result_to_the_next_step() -> None:
    stats = EngineStats()
    stats.note_fed(1.0)  # the first step ever: nothing was waiting for it
    stats.note_dry(2.0)
    stats.note_fed(2.5)
    stats.note_fed(3.0)
    assert stats.starved_us_sum == 500_000.0


def test_an_idle_server_does_not_starve_its_workers() -> None:
    stats = EngineStats()
    stats.note_dry(2.0)
    stats.note_idle()  # what ran was cancelled
    stats.note_fed(100.0)
    assert stats.starved_us_sum == 0.0


def test_a_rate_is_that_of_the_last_seconds() -> None:
    rate = RecentRate(0.0)
    for tick in range(1, 101):  # 10 s at 50 tokens per second, noted more often than it is kept
        rate.note(tick / 10, tick * 5)
    assert rate.per_second(10.0, 500) == pytest.approx(50.0)
    assert rate.per_second(12.5, 500) == pytest.approx(25.0, rel=0.1)  # nothing for half of the window
    assert rate.per_second(10.0 + RATE_WINDOW_S, 500) == 0.0
    assert rate.per_second(1000.0, 500) == 0.0


def test_a_young_server_has_the_rate_since_its_start() -> None:
    rate = RecentRate(100.0)
    assert rate.per_second(100.0, 0) == 0.0
    assert rate.per_second(101.0, 30) == 30.0
    rate.note(101.0, 30)
    assert rate.per_second(102.0, 40) == 20.0


def test_a_rate_keeps_few_totals() -> None:
    rate = RecentRate(0.0)
    for tick in range(100_000):
        rate.note(tick / 1000, tick)
    assert len(rate._totals) < 30
