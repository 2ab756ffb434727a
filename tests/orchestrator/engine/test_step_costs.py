"""How many tokens a step may have beside others, by the times of steps that were measured."""

import pytest

from mgpu.orchestrator.engine.step_costs import StepCosts


def costs_of(*points: tuple[int, float]) -> StepCosts:
    costs = StepCosts()
    for tokens, seconds in points:
        for _ in range(9):
            costs.note(tokens, seconds, False)
    return costs


@pytest.mark.parametrize(
    ("beside", "room"),
    [(8, 8), (40, 20), (80, 40), (1, 15)],
    ids=["between two", "beyond all", "beyond all, in proportion", "below all"],
)
def test_a_step_with_the_room_filled_takes_half_as_long_again(beside: int, room: int) -> None:
    assert costs_of((8, 0.020), (40, 0.060)).room_beside(beside, 3 / 2) == pytest.approx(room, abs=1)


def test_where_more_tokens_take_no_longer_the_room_is_large() -> None:
    assert costs_of((8, 0.004), (500, 0.005), (8000, 0.200)).room_beside(8, 3 / 2) > 500


def test_one_slow_step_of_a_size_makes_no_smaller_step_seem_quick() -> None:
    room = costs_of((8, 0.020), (20, 0.010), (40, 0.060)).room_beside(8, 3 / 2)
    assert 12 <= room < 32


def test_steps_that_another_owner_has_made_longer_are_no_measure_of_those_without() -> None:
    """17 tokens of one owner, and 23 with what another decodes already."""
    costs = costs_of((17, 0.025), (23, 0.031), (31, 0.039))
    assert costs.room_beside(17, 4 / 3) == pytest.approx(8, abs=1)


def test_before_anything_was_measured_time_grows_with_tokens() -> None:
    assert StepCosts().room_beside(12, 3 / 2) == 6
    assert StepCosts().room_beside(1, 3 / 2) == 1


def test_what_is_measured_follows_the_machine() -> None:
    costs = costs_of((8, 0.020), (40, 0.060))
    for _ in range(9):
        costs.note(40, 0.020, False)
    assert costs.room_beside(8, 3 / 2) >= 32


def test_a_first_step_for_which_kernels_were_compiled_teaches_nothing() -> None:
    costs = costs_of((8, 0.020))
    costs.note(40, 30.0, False)
    assert costs.room_beside(8, 3 / 2) == 4, "as if no step of this size had been seen"
    for _ in range(2):
        costs.note(40, 0.060, False)
    assert costs.room_beside(8, 3 / 2) == 8


def test_a_first_size_that_was_compiled_does_not_make_the_others_look_quick() -> None:
    costs = StepCosts()
    for seconds in (30.0, 0.020, 0.020):
        costs.note(8, seconds, False)
    for _ in range(3):
        costs.note(40, 0.060, False)
    assert costs.room_beside(8, 3 / 2) == 8


def test_prompts_have_the_room_that_steps_with_prompts_leave() -> None:
    costs = costs_of((8, 0.020), (40, 0.060))
    assert costs.prompt_room_beside(8, 4 / 3) == 5, "a third longer, before one was computed beside others"
    for tokens, seconds in ((50, 0.022), (120, 0.024), (500, 0.060)):
        for _ in range(3):
            costs.note(tokens, seconds, True)
    assert costs.room_beside(8, 3 / 2) == 8
    assert 120 < costs.prompt_room_beside(8, 4 / 3) < 250


def test_costly_prompts_do_not_hold_back_what_is_decoded() -> None:
    costs = costs_of((8, 0.020), (40, 0.021))
    for _ in range(9):
        costs.note(40, 0.400, True)
    assert costs.room_beside(8, 3 / 2) > 30
    assert costs.prompt_room_beside(8, 4 / 3) == 1


def test_while_steps_take_no_longer_one_of_twice_the_size_is_tried() -> None:
    costs = costs_of((1, 0.010))
    tried = []
    for _ in range(8):
        tried.append(1 + costs.room_beside(1, 3 / 2))
        for _ in range(3):
            costs.note(tried[-1], 0.010 if tried[-1] < 100 else 0.020, False)
    assert tried[:6] == [2, 4, 8, 16, 32, 64]
    assert 64 < tried[-1] < 128
