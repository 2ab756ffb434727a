"""Turns by owner: the same time for each, however much one of them asks for."""

import random
from collections import Counter

from mgpu.orchestrator.gateway.front.fair_turns import FairTurns


def serve(turns: FairTurns[float], seconds: float) -> Counter[str]:
    """Serve items, which are their own cost, for a while; return the time of each owner."""
    spent: Counter[str] = Counter()
    while spent.total() < seconds and (taken := turns.take()) is not None:
        owner, cost_s = taken
        spent[owner] += cost_s  # type: ignore[assignment]
        turns.charge(owner, cost_s)
    return spent


def test_owners_get_the_same_time_whatever_their_items_cost() -> None:
    turns: FairTurns[float] = FairTurns()
    for _ in range(1000):
        turns.put("expensive", 0.003)
        turns.put("cheap", 0.0001)
        turns.put("mixed", random.Random(1).choice([0.00002, 0.001]))
    spent = serve(turns, 0.06)
    assert all(0.016 <= spent[owner] <= 0.024 for owner in ("expensive", "cheap", "mixed")), spent


def test_a_newcomer_is_next_and_pays_nothing_for_what_others_had() -> None:
    turns: FairTurns[float] = FairTurns()
    for _ in range(1000):
        turns.put("flood", 0.003)
    serve(turns, 1.0)
    turns.put("new", 0.0001)
    assert serve(turns, 0.0001) == {"new": 0.0001}


def test_an_owner_that_was_away_has_saved_up_nothing() -> None:
    turns: FairTurns[float] = FairTurns()
    turns.put("old", 0.001)
    serve(turns, 1.0)
    for _ in range(1000):
        turns.put("busy", 0.001)
    serve(turns, 0.5)
    for _ in range(1000):
        turns.put("old", 0.001)
    spent = serve(turns, 0.1)
    assert abs(spent["old"] - spent["busy"]) <= 0.003


def test_an_owner_whose_item_is_out_has_no_other_turn_before_it_is_charged() -> None:
    turns: FairTurns[int] = FairTurns()
    turns.put("one", 1)
    turns.put("one", 2)
    assert turns.take() == ("one", 1)
    assert turns.take() is None
    assert not turns
    turns.put("other", 3)
    assert turns.take() == ("other", 3)
    turns.charge("one", 0.1)
    assert turns.take() == ("one", 2)


def test_a_cost_beside_the_items_counts_too() -> None:
    turns: FairTurns[int] = FairTurns()
    turns.put("dropped", 1)
    turns.put("honest", 2)
    turns.charge("dropped", 0.5)
    assert turns.take() == ("honest", 2)


def test_bytes_are_counted_by_owner_and_removed_items_leave_none() -> None:
    turns: FairTurns[int] = FairTurns()
    for number in range(10):
        turns.put("big" if number % 2 else "small", number, 100 if number % 2 else 1)
    assert (turns.bytes_of("big"), turns.bytes_of("nobody"), turns.nbytes, turns.largest()) == (500, 0, 505, "big")
    assert turns.remove("big", lambda item: item > 3) == [5, 7, 9]
    assert turns.remove("nobody") == []
    assert (turns.bytes_of("big"), turns.nbytes) == (200, 205)
    served = []
    while (taken := turns.take()) is not None:
        served.append(taken[1])
        turns.charge(taken[0], 0.1)
    assert sorted(served) == [0, 1, 2, 3, 4, 6, 8]
    assert turns.nbytes == 0


def test_idle_owners_are_forgotten() -> None:
    turns: FairTurns[int] = FairTurns()
    for number in range(20_000):
        turns.put(f"connection {number}", number)
        taken = turns.take()
        assert taken is not None
        turns.charge(taken[0], 0.001)
    assert len(turns._owners) < 10_000
