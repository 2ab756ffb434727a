"""Replicas of another model get no requests; those of another version do, with a warning."""

import logging

import pytest

from mgpu.orchestrator.router.agreement import Agreement
from mgpu.orchestrator.router.fleet import Fleet
from mgpu.protocol.front.server_messages import Health
from mgpu.protocol.internal.router_messages import KnownReplica, RouterOrders


class Told:
    """A replica that has told what it serves."""

    def __init__(self, name: str, served: str, version: str = "1") -> None:
        self.name, self.served, self.difference = name, served, ""
        self.health = Health(1, "ready", "m", 1, 1, 0, 0.0, "", version=version)


def check(agreement: Agreement, *replicas: Told) -> list[bool]:
    agreement.check(replicas)  # type: ignore[arg-type]
    return [bool(each.difference) for each in replicas]


def test_a_replica_of_another_model_is_taken_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    agreement, first, second = Agreement(), Told("replica0", "a"), Told("replica1", "a")
    other = Told("replica2", "b")
    assert check(agreement, other) == [False], "alone it fits"
    agreement = Agreement()
    assert check(agreement, first, second, other) == [False, False, True]
    assert "serves b, and 2 of 3 replicas serve a" in other.difference
    assert "take it out of the list" in caplog.text
    assert check(agreement, other, first) == [True, False], "the model that was known first stays"
    first.served = second.served = ""
    assert check(agreement, other, first, second) == [False, False, False], "nobody serves the first any more"


def test_versions_that_differ_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    agreement, replicas = Agreement(), (Told("replica0", "a", "1"), Told("replica1", "a", "2"))
    with caplog.at_level(logging.WARNING):
        assert [check(agreement, *replicas) for _ in range(3)] == [[False, False]] * 3
    assert caplog.text.count("replica0 runs 1, replica1 runs 2") == 1


def test_a_replica_that_is_ordered_no_longer_is_gone_and_its_name_is_free() -> None:
    fleet = Fleet()
    first, second = (KnownReplica(f"replica{at}", f"ipc:///nowhere/{at}") for at in range(2))
    try:
        fleet.follow(RouterOrders([first, second]))
        kept = fleet.replicas[1]
        fleet.follow(RouterOrders([second]))
        assert fleet.replicas == [kept]
        fleet.follow(RouterOrders([second, KnownReplica("replica0", "ipc:///nowhere/9")]))
        assert [each.name for each in fleet.replicas] == ["replica1", "replica0"]
        assert fleet.replicas[1].session is not None
        assert fleet.replicas[1].session.channel.endpoint == "ipc:///nowhere/9"
    finally:
        fleet.close()
