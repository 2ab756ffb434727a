"""What the engine counts of its own time."""

from mgpu.orchestrator.engine.stats import Average, EngineStats


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
