"""Time for messages: a share of what passes, and a burst after a quiet while."""

import pytest

from mgpu.orchestrator.gateway.front.pace import (
    LEAST_S,
    MODEST_PAUSE_S,
    MODEST_SHARE,
    MOST_OWN_S,
    MOST_S,
    OWN_SHARE,
    SHARE,
    Modest,
    Pace,
    share_beside_streams,
)


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


def test_a_flood_is_one_until_all_of_it_is_paid_for() -> None:
    clock = Clock()
    modest = Modest(clock)
    modest.charge("modest", MOST_OWN_S / 2)
    modest.charge("flood", 2 * MOST_OWN_S)
    assert modest.floods() == ["flood"]
    clock.now_s += 1.1 * MOST_OWN_S / OWN_SHARE
    assert (modest.has("flood"), modest.floods()) == (True, ["flood"]), "it owes nothing, and may go on in a moment"
    clock.now_s += MOST_OWN_S / OWN_SHARE
    assert modest.floods() == []


def test_messages_have_less_of_the_time_where_workers_lack_it() -> None:
    assert [share_beside_streams(cores) for cores in (1, 2, 3, 64)] == [0.15, 0.15, 0.2, 0.2]


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


def test_who_floods_is_not_modest_until_it_has_been_quiet() -> None:
    clock = Clock()
    modest = Modest(clock)
    assert modest.has("key:new")
    for _ in range(20):
        modest.charge("key:flood", 0.004)
        clock.now_s += 0.02
    assert not modest.has("key:flood")
    assert modest.has("key:new")
    clock.now_s += 2 * MOST_OWN_S / OWN_SHARE
    assert modest.has("key:flood")


def test_who_costs_less_than_its_share_stays_modest() -> None:
    clock = Clock()
    modest = Modest(clock)
    for _ in range(1000):
        modest.charge("pid:1", 0.9 * OWN_SHARE * 0.01)
        clock.now_s += 0.01
        assert modest.has("pid:1")


def test_looks_for_the_messages_of_the_modest_have_a_bound_too() -> None:
    clock = Clock()
    modest, spent_s, num_looks = Modest(clock), 0.0, 0
    while clock.now_s < 110.0:
        if modest.wait_s() == 0:
            modest.spend(0.004)
            clock.now_s += 0.004
            spent_s, num_looks = spent_s + 0.004, num_looks + 1
        else:
            clock.now_s += modest.wait_s() + 1e-9
    assert spent_s == pytest.approx(10 * MODEST_SHARE + MOST_S, rel=0.05)
    assert num_looks <= 10 / MODEST_PAUSE_S


def test_owners_that_have_cost_something_are_forgotten() -> None:
    clock = Clock()
    modest = Modest(clock)
    for number in range(1000):
        modest.charge(f"pid:{number}", 0.001)
        clock.now_s += 0.1
    assert len(modest._costs) < 50
