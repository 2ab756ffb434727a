"""What the answers of messages cost later counts like the messages themselves."""

from typing import Any, cast

from mgpu.orchestrator.gateway.clients import Clients
from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns

FLOOD, OTHER = Account("pid:1", "flood"), Account("pid:2", "other")


class Requests:
    """Stands in for the requests in flight."""

    def __init__(self, count: int) -> None:
        self.table = [None] * count


def clients_beside(num_requests: int) -> tuple[Clients, FairTurns[Any]]:
    turns: FairTurns[Any] = FairTurns()
    others = [cast("Any", None)] * 6
    return Clients(cast("Any", None), turns, cast("Any", Requests(num_requests)), *others), turns


def test_later_work_is_spent_from_the_time_for_messages() -> None:
    clients, _ = clients_beside(num_requests=1)
    assert clients.wait_s() == 0
    clients.charge({FLOOD: 10.0})
    clients.charge({FLOOD: 10.0})
    assert clients._pace.wait_s() > 0
    assert not clients._modest.has(FLOOD.owner)
    assert clients._modest.has(OTHER.owner)


def test_later_work_delays_no_message_while_nothing_runs() -> None:
    clients, _ = clients_beside(num_requests=0)
    clients.charge({FLOOD: 10.0})
    assert clients._pace.wait_s() == 0


def test_who_has_caused_later_work_is_served_after_others() -> None:
    clients, turns = clients_beside(num_requests=1)
    clients.charge({FLOOD: 1.0})
    turns.put(FLOOD.path, "of the flood", 1)
    turns.put(OTHER.path, "of another", 1)
    taken = turns.take()
    assert taken is not None
    assert taken[1] == "of another"
