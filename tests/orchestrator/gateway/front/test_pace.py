"""Time for messages: a share of what passes, and a burst after a quiet while."""

import pytest

from mgpu.orchestrator.gateway.front.pace import LEAST_S, MOST_S, SHARE, Pace


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_flood_gets_its_burst_and_then_its_share() -> None:
    clock = Clock()
    pace, spent_s = Pace(clock), 0.0
    while clock.now_s < 110.0:
        if pace.wait_s() == 0:
            pace.spend(0.004)
            clock.now_s += 0.004
            spent_s += 0.004
        else:
            clock.now_s += pace.wait_s() + 1e-9
    assert spent_s == pytest.approx(10 * SHARE + MOST_S, rel=0.05)


def test_what_was_spent_beyond_is_waited_for() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.spend(MOST_S)
    pace.spend(0.03)
    assert pace.left_s() == pytest.approx(-0.03)
    assert pace.wait_s() == pytest.approx((0.03 + LEAST_S) / SHARE)
    clock.now_s += 1000.0
    assert pace.left_s() == MOST_S
    assert pace.wait_s() == 0


def test_no_pause_is_long_whatever_was_spent() -> None:
    pace = Pace(Clock())
    pace.spend(60.0)
    assert pace.wait_s() <= (MOST_S + LEAST_S) / SHARE + 1e-9
