"""Copies that are started again one after the other, by stand-ins and a clock of the test."""

from typing import cast

from mgpu.orchestrator.router.copies import Copy
from mgpu.orchestrator.router.roll import KILL_S, Roll
from mgpu.protocol.internal.router_messages import ReplicaReport


class FakeCopy:
    """A copy that ends only when it is killed, and is ready at once when it is started again."""

    def __init__(self) -> None:
        self.name, self.endpoint, self.is_held, self.is_gone = "replica0", "ipc:///0", False, False
        self.report = ReplicaReport(self.name, "ready", 1)
        self.events: list[str] = []

    def begin_to_stop(self) -> None:
        self.events.append("stop")

    def kill(self) -> None:
        self.events.append("kill")
        self.is_gone = True

    def start_again(self) -> None:
        self.events.append("start")
        self.endpoint, self.is_gone = "ipc:///1", False


def test_a_copy_that_does_not_stop_is_killed_after_its_time_and_started_again() -> None:
    copy = FakeCopy()
    roll = Roll([cast(Copy, copy)], drain_timeout_s=30.0)
    roll.begin()
    happened = {}
    for now_s in (100.0, 129.0, 130.0, 130.0 + KILL_S, 131.0 + KILL_S, 132.0 + KILL_S, 133.0 + KILL_S):
        roll.advance(now_s)
        happened[now_s - 100.0] = " ".join(copy.events)
    assert list(happened.values()) == ["", "", "stop", "stop", "stop kill", "stop kill start", "stop kill start"]
    assert (roll.done, roll.is_going_on, copy.is_held) == (1, False, False)
