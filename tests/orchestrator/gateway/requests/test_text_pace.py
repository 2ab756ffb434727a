"""Long texts of one owner leave the core to the streams of others where cores are few."""

import math

import pytest

from mgpu.orchestrator.gateway.front.pace import MOST_OWN_S, OWN_SHARE
from mgpu.orchestrator.gateway.requests.text_pace import MOST_DEBT_S, MOST_S, SHARE, TextPace


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def spent_in(seconds: float, text_s: float, *, num_cores: int = 1, has_company: bool = True) -> float:
    """Return the time of one owner's texts, of which each takes ``text_s``, if there is always one more."""
    clock = Clock()
    pace, spent_s = TextPace(num_cores, clock), 0.0
    while clock.now_s < 100.0 + seconds:
        if pace.lets("flood", 0, has_company):
            clock.now_s += text_s
            spent_s += text_s
            pace.charge("flood", text_s)
        else:
            assert 0 < pace.wait_s() < math.inf
            clock.now_s += pace.wait_s() + 1e-9
            assert pace.is_due()
    return spent_s


def test_long_texts_beside_streams_of_others_have_their_share_of_a_core() -> None:
    assert spent_in(60.0, 0.06) == pytest.approx(60 * SHARE + MOST_S + 0.06, rel=0.05)


@pytest.mark.parametrize("case", [{"num_cores": 3}, {"has_company": False}])
def test_nobody_waits_for_cores_to_spare_or_for_itself(case: dict[str, bool]) -> None:
    assert spent_in(10.0, 0.06, **case) == pytest.approx(10.0, rel=0.05)


def test_a_text_of_seconds_delays_the_next_one_of_another_owner_by_some_seconds_at_most() -> None:
    clock = Clock()
    pace = TextPace(1, clock)
    for owner in ("flood", "other"):
        pace.charge(owner, 2 * MOST_OWN_S)
    for _ in range(3):
        pace.charge("flood", 4.0)
    assert not pace.lets("other", 0, has_company=True)
    assert pace.wait_s() == pytest.approx(MOST_DEBT_S / SHARE, rel=0.01)


def test_who_has_cost_little_never_waits_and_who_has_cost_much_has_one_at_a_time() -> None:
    clock = Clock()
    pace = TextPace(1, clock)
    pace.charge("flood", 2 * MOST_OWN_S)
    assert pace.lets("flood", 0, has_company=True)
    assert not pace.lets("flood", 1, has_company=True)
    assert pace.wait_s() == math.inf, "the end of the text that runs is waited for"
    for _ in range(3):
        pace.charge("flood", 1.0)
    assert pace.lets("quick", 1, has_company=True)
    clock.now_s += 2 * MOST_OWN_S / OWN_SHARE
    assert pace.lets("flood", 1, has_company=True), "it has been quiet since"


def test_a_time_to_ask_again_is_due_once() -> None:
    clock = Clock()
    pace = TextPace(1, clock)
    for _ in range(2):
        pace.charge("flood", 0.3)
    assert (pace.lets("flood", 0, has_company=True), pace.is_due()) == (False, False)
    clock.now_s += pace.wait_s()
    assert [pace.is_due(), pace.is_due(), pace.wait_s()] == [True, False, math.inf]
