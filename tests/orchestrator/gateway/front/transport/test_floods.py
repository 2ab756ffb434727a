"""A connection that sends more than is read, and nothing that has an answer, is ended; one that waits is not."""

import pytest

from mgpu.orchestrator.gateway.front.transport.floods import FLOOD_MESSAGES, FLOOD_S, LOOK_S, Floods
from mgpu.orchestrator.gateway.front.transport.open_connection import OpenConnection


class Server:
    """Connections with what the kernel holds of them, and a clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.unread = {1: 1000, 2: 1000}
        self.floods = Floods(self._unread_bytes, lambda: self.now_s)
        self.flood, self.other = (OpenConnection(fd, 0, "pid:1", "pid:1", self.now_s) for fd in (1, 2))

    def _unread_bytes(self, fd: int) -> int:
        if fd not in self.unread:
            raise OSError
        return self.unread[fd]

    def ended(self, seconds: float, of_other: int = 100) -> list[int]:
        """Let time pass in which both send; return what was ended."""
        found = []
        for _ in range(round(seconds / LOOK_S)):
            self.now_s += LOOK_S
            self.flood.num_heard += 100
            self.other.num_heard += of_other
            found += [each.fd for each in self.floods.look([self.flood, self.other])]
        return found


def test_who_is_never_read_up_and_has_no_answers_is_ended() -> None:
    server = Server()
    server.unread[2] = 0
    assert server.ended(FLOOD_S - LOOK_S) == []
    assert server.ended(LOOK_S) == [1]


def test_a_connection_that_was_read_up_once_begins_anew() -> None:
    server = Server()
    server.ended(FLOOD_S - LOOK_S)
    server.unread[1], server.unread[2] = 0, 1000
    assert server.ended(LOOK_S) == [2]
    server.unread = {1: 1000}
    assert server.ended(FLOOD_S - LOOK_S) == []
    assert server.ended(LOOK_S) == [1]


def test_who_gets_answers_is_never_ended() -> None:
    server = Server()
    del server.unread[2]
    for _ in range(3):
        server.flood.is_answered = True
        assert server.ended(FLOOD_S - LOOK_S) == []


@pytest.mark.parametrize("of_other", [0, int(FLOOD_MESSAGES / FLOOD_S) - 1])
def test_few_messages_are_no_flood(of_other: int) -> None:
    server = Server()
    assert server.ended(FLOOD_S, of_other) == [1]


def test_a_burst_of_a_new_connection_is_no_flood() -> None:
    server = Server()
    server.flood.num_heard = server.other.num_heard = 10 * FLOOD_MESSAGES
    assert server.ended(LOOK_S) == []
