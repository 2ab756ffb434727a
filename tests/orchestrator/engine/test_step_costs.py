"""How many tokens a step may have beside others, by the times of steps that were measured."""

import pytest

from mgpu.orchestrator.engine.step_costs import StepCosts


def costs_of(*points: tuple[int, float]) -> StepCosts:
    costs = StepCosts()
    for tokens, seconds in points:
        for _ in range(50):
            costs.note(tokens, seconds)
    return costs


@pytest.mark.parametrize(
    ("beside", "room"),
    [(8, 5), (40, 13), (80, 27), (1, 12)],
    ids=["between two", "beyond all", "beyond all, in proportion", "below all"],
)
def test_a_step_with_the_room_filled_takes_a_third_longer(beside: int, room: int) -> None:
    assert costs_of((8, 0.020), (40, 0.060)).room_beside(beside) == pytest.approx(room, abs=1)


def test_where_more_tokens_take_no_longer_the_room_is_large() -> None:
    assert costs_of((8, 0.004), (500, 0.005), (8000, 0.200)).room_beside(8) > 500


def test_one_slow_step_of_a_size_makes_no_smaller_step_seem_quick() -> None:
    room = costs_of((8, 0.020), (20, 0.010), (40, 0.060)).room_beside(8)
    assert 12 <= room < 32


def test_before_anything_was_measured_time_grows_with_tokens() -> None:
    assert StepCosts().room_beside(12) == 4
    assert StepCosts().room_beside(1) == 1


def test_what_is_measured_follows_the_machine() -> None:
    costs = costs_of((8, 0.020), (40, 0.060))
    for _ in range(100):
        costs.note(40, 0.020)
    assert costs.room_beside(8) >= 32
