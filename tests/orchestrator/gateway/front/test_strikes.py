"""Who is not let in for a while, and for how long."""

import pytest

from mgpu.orchestrator.gateway.front.strikes import (
    FIRST_S,
    LONGEST_S,
    QUIET_S,
    TOLERATED_FRAMES,
    TOLERATED_PER_S,
    ShutOut,
)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("owner", ["key:abc", "pid:7"])
def test_each_strike_but_the_first_shuts_an_owner_out_for_longer(clock: Clock, owner: str) -> None:
    shut_out = ShutOut(clock)
    shut_out.strike(owner)
    assert not shut_out.has(owner), "its other connections may be innocent"
    for seconds in (FIRST_S, 2 * FIRST_S, 4 * FIRST_S):
        shut_out.strike(owner)
        clock.now_s += seconds * 0.99
        assert shut_out.has(owner)
        clock.now_s += seconds * 0.02
        assert not shut_out.has(owner)
    for _ in range(100):
        shut_out.strike(owner)
    clock.now_s += LONGEST_S + 0.01
    assert not shut_out.has(owner)
    clock.now_s += 200 * QUIET_S
    shut_out.strike(owner)
    assert not shut_out.has(owner)


@pytest.mark.parametrize("owner", ["127.0.0.1", "::1", ""])
def test_an_address_is_not_shut_out(clock: Clock, owner: str) -> None:
    shut_out = ShutOut(clock)
    for _ in range(5):
        shut_out.strike(owner)
    assert not shut_out.has(owner)


def test_others_are_let_in(clock: Clock) -> None:
    shut_out = ShutOut(clock)
    for _ in range(5):
        shut_out.strike("key:abc")
    assert shut_out.has("key:abc")
    assert not shut_out.has("key:other")


def test_some_frames_too_many_are_tolerated_and_forgotten(clock: Clock) -> None:
    shut_out = ShutOut(clock)
    assert shut_out.tolerates("key:abc", TOLERATED_FRAMES)
    assert not shut_out.tolerates("key:abc", 1)
    assert shut_out.tolerates("key:other", 1)
    clock.now_s += 2.0
    assert shut_out.tolerates("key:abc", 2 * TOLERATED_PER_S - 1)
    assert not shut_out.tolerates("key:abc", 1)


def test_owners_are_not_remembered_for_ever(clock: Clock) -> None:
    shut_out = ShutOut(clock)
    for number in range(5000):
        shut_out.tolerates(f"pid:{number}", 1)
        clock.now_s += 1.0
    assert len(shut_out._strikes) < 5000
