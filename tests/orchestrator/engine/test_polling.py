"""When the engine sleeps, and when it looks again at once."""

import math

import pytest

from mgpu.orchestrator.engine.polling import SpinPolicy


@pytest.mark.parametrize(
    ("now_s", "sleep_s"), [(10.0, 4.0), (13.75, 0.25), (14.0, 0.0), (15.75, 0.0), (16.0, math.inf)], ids=str
)
def test_it_sleeps_until_a_result_is_almost_due_and_looks_for_a_while(now_s: float, sleep_s: float) -> None:
    assert SpinPolicy(spin_s=2.0).sleep_s(now_s, due_s=15.0) == sleep_s


def test_with_nothing_in_flight_it_is_awake_only_after_it_was_told_to_be() -> None:
    policy = SpinPolicy(spin_s=2.0)
    assert policy.sleep_s(10.0, None) == math.inf
    assert policy.stay_awake(10.0)
    assert [policy.sleep_s(now_s, None) for now_s in (10.0, 11.9, 12.0)] == [0.0, 0.0, math.inf]


def test_without_spinning_it_always_sleeps() -> None:
    policy = SpinPolicy(spin_s=0.0)
    assert not policy.stay_awake(10.0)
    assert policy.sleep_s(10.0, None) == policy.sleep_s(10.0, 10.0) == math.inf
