"""Turns by owner: the same time for each, however much one of them asks for."""

import random
from collections import Counter

from mgpu.orchestrator.gateway.front.fair_turns import FairTurns


def serve(turns: FairTurns[float], seconds: float) -> Counter[str]:
    """Serve items, which are their own cost, for a while; return the time of each owner."""
    spent: Counter[str] = Counter()
    while spent.total() < seconds and (taken := turns.take()) is not None:
        path, cost_s = taken
        spent[path[0]] += cost_s  # type: ignore[assignment]
        turns.charge(path, cost_s)
    return spent


def test_owners_get_the_same_time_whatever_their_items_cost() -> None:
    turns: FairTurns[float] = FairTurns()
    for _ in range(1000):
        turns.put(("expensive",), 0.003)
        turns.put(("cheap",), 0.0001)
        turns.put(("mixed",), random.Random(1).choice([0.00002, 0.001]))
    spent = serve(turns, 0.06)
    assert all(0.016 <= spent[owner] <= 0.024 for owner in ("expensive", "cheap", "mixed")), spent


def test_a_newcomer_is_next_and_pays_nothing_for_what_others_had() -> None:
    turns: FairTurns[float] = FairTurns()
    for _ in range(1000):
        turns.put(("flood",), 0.003)
    serve(turns, 1.0)
    turns.put(("new",), 0.0001)
    assert serve(turns, 0.0001) == {"new": 0.0001}


def test_an_owner_that_was_away_has_saved_up_nothing() -> None:
    turns: FairTurns[float] = FairTurns()
    turns.put(("old",), 0.001)
    serve(turns, 1.0)
    for _ in range(1000):
        turns.put(("busy",), 0.001)
    serve(turns, 0.5)
    for _ in range(1000):
        turns.put(("old",), 0.001)
    spent = serve(turns, 0.1)
    assert abs(spent["old"] - spent["busy"]) <= 0.003


def test_an_owner_whose_item_is_out_has_no_other_turn_before_it_is_charged() -> None:
    turns: FairTurns[int] = FairTurns()
    turns.put(("one",), 1)
    turns.put(("one",), 2)
    assert turns.take() == (("one",), 1)
    assert turns.take() is None
    assert not turns
    turns.put(("other",), 3)
    assert turns.take() == (("other",), 3)
    turns.charge(("one",), 0.1)
    assert turns.take() == (("one",), 2)


def test_a_cost_beside_the_items_counts_too() -> None:
    turns: FairTurns[int] = FairTurns()
    turns.put(("dropped",), 1)
    turns.put(("honest",), 2)
    turns.charge_beside(("dropped",), 0.5)
    assert turns.take() == (("honest",), 2)


def test_bytes_are_counted_by_owner_and_removed_items_leave_none() -> None:
    turns: FairTurns[int] = FairTurns()
    for number in range(10):
        turns.put(("big",) if number % 2 else "small", number, 100 if number % 2 else 1)
    assert (turns.bytes_of(("big",)), turns.bytes_of(("nobody",)), turns.nbytes, turns.largest()) == (
        500,
        0,
        505,
        ("big",),
    )
    assert turns.remove(("big",), lambda item: item > 3) == [5, 7, 9]
    assert turns.remove(("nobody",)) == []
    assert (turns.bytes_of(("big",)), turns.nbytes) == (200, 205)
    served = []
    while (taken := turns.take()) is not None:
        served.append(taken[1])
        turns.charge(taken[0], 0.1)
    assert sorted(served) == [0, 1, 2, 3, 4, 6, 8]
    assert turns.nbytes == 0


def test_idle_owners_are_forgotten() -> None:
    turns: FairTurns[int] = FairTurns()
    for number in range(20_000):
        turns.put((f"connection {number}",), number)
        taken = turns.take()
        assert taken is not None
        turns.charge(taken[0], 0.001)
    assert len(turns._root.parts) < 10_000


def test_an_owner_gains_nothing_by_having_many_parts() -> None:
    turns: FairTurns[float] = FairTurns()
    for part in range(100):
        for _ in range(10):
            turns.put(("many", str(part)), 0.001)
    for _ in range(1000):
        turns.put(("one", "alone"), 0.001)
    spent = serve(turns, 0.1)
    assert abs(spent["many"] - spent["one"]) <= 0.003


def test_parts_divide_the_share_of_their_owner() -> None:
    turns: FairTurns[tuple[str, float]] = FairTurns()
    for _ in range(500):
        turns.put(("owner", "expensive"), ("expensive", 0.004))
        turns.put(("owner", "group", "cheap"), ("cheap", 0.001))
        turns.put(("owner", "group", "cheaper"), ("cheaper", 0.0005))
        turns.put(("other", "x"), ("other", 0.002))
    spent: Counter[str] = Counter()
    while spent.total() < 0.4 and (taken := turns.take()) is not None:
        path, (name, cost_s) = taken
        spent[name] += cost_s  # type: ignore[assignment]
        turns.charge(path, cost_s)
    shares = {"other": 0.2, "expensive": 0.1, "cheap": 0.05, "cheaper": 0.05}
    assert all(abs(spent[name] - share) <= 0.006 for name, share in shares.items()), spent


def test_an_endless_row_of_newcomers_starves_nobody() -> None:
    turns: FairTurns[float] = FairTurns()
    turns.put(("honest", "x"), 0.01)
    turns.put(("other", "x"), 0.01)
    serve(turns, 0.02)
    turns.put(("honest", "x"), 0.01)
    spent: Counter[str] = Counter()
    for newcomer in range(100):
        turns.put((f"process {newcomer}", "x"), 0.001)
        spent += serve(turns, 0.001)
    assert spent["honest"]


def test_two_parts_of_an_owner_may_be_out_at_once_and_one_part_may_not() -> None:
    turns: FairTurns[int] = FairTurns()
    for number, part in enumerate(["a", "a", "b"]):
        turns.put(("owner", part), number)
    assert turns.take() == (("owner", "a"), 0)
    assert turns.take() == (("owner", "b"), 2)
    assert turns.take() is None
    turns.charge(("owner", "a"), 0.1)
    assert turns.take() == (("owner", "a"), 1)


def test_the_largest_is_looked_for_among_those_of_the_largest_owner() -> None:
    turns: FairTurns[int] = FairTurns()
    turns.put(("one", "x"), 1, 50)
    for part in range(10):
        turns.put(("many", str(part)), 2, 10 + part)
    assert turns.largest() == ("many", "9")
    assert turns.bytes_of(("many",)) == 145


def test_parts_that_come_and_go_are_forgotten() -> None:
    turns: FairTurns[int] = FairTurns()
    turns.put(("owner", "stays"), 0)
    for number in range(20_000):
        turns.put(("owner", f"connection {number}"), number)
        taken = turns.take()
        assert taken is not None
        turns.charge(taken[0], 0.001)
    assert len(turns._root.parts["owner"].parts) < 10_000


def test_owners_that_may_not_have_a_turn_are_passed_over_and_keep_their_place() -> None:
    turns: FairTurns[float] = FairTurns()
    for owner in ("flood", "other flood", "modest"):
        turns.put((owner, "connection"), 1.0)
        turns.put((owner, "connection"), 2.0)
    for cost_s in (1.0, 2.0):
        assert turns.take(lambda owner: owner == "modest") == (("modest", "connection"), cost_s)
        turns.charge(("modest", "connection"), 1.0)
    assert turns.take(lambda owner: owner == "modest") is None
    left = []
    while (taken := turns.take()) is not None:
        left.append(taken)
        turns.charge(taken[0], 0.1)
    assert [path[0] for path, _ in left] == ["flood", "other flood"] * 2
    assert not turns
