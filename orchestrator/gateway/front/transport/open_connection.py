"""One open connection of the front socket, and the choice of those that have to go."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class OpenConnection:
    """One connection of the front socket."""

    fd: int
    inode: int
    origin: str
    owner: str
    since_s: float
    is_proven: bool = False
    name: bytes = b""
    """The ROUTER's id, once it has sent a message."""
    peer: tuple[str, str] = ("", "")
    """Its identity and owner, as its first message has said."""
    takes_batches: bool = False
    """It has said that it reads arrays of messages."""
    end_at_s: float | None = None
    is_heard: bool = False
    """A message has come since endless.py has last looked."""
    endless_s: float = 0.0
    """For how much of libzmq's time it has had unread bytes since then; see endless.py."""
    num_heard: int = 0
    behind_since_s: float = 0.0
    """How many messages have come since it had no unread bytes or an answer, and when that was; see floods.py."""
    is_answered: bool = False
    """Something was sent to it since floods.py has last looked."""
    piped_bytes: int = 0
    """Handed to libzmq since it was last seen that the peer has taken everything; see pipe_room.py."""
    ask_at_bytes: int = 0
    """The number at which this is looked at next."""
    piped_at_s: float = 0.0
    """How long libzmq had worked when the bytes were last looked at; see pipe_room.py."""


def excess(connections: Iterable[OpenConnection], kept: int) -> list[OpenConnection]:
    """Return what has to go so that ``kept`` stay: of the owner with the most, first the silent, then the oldest."""
    groups: defaultdict[str, list[OpenConnection]] = defaultdict(list)
    for each in connections:
        groups[each.owner].append(each)
    for group in groups.values():
        group.sort(key=lambda each: (bool(each.name), each.since_s), reverse=True)
    count = sum(map(len, groups.values()))
    return [max(groups.values(), key=len).pop() for _ in range(count - kept)]
