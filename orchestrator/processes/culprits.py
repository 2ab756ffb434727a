"""Find out whose input a gateway died of, and keep that client out for a while.

The gateway writes what it works on into memory that outlives it (`protocol/internal/process/work_record.py`). After a
death that clients can have caused, that is read here:

- The owner of the message, or whom the gateway itself has accused, is shut out: for 1 s, then 2, 4, 8 and so on, up to
  `LONGEST_S`. Each quiet minute takes one step back.
- The message is noted. Its client sends it again to the next gateway. If that handles it, the message was innocent: it
  is forgotten, and so is the step of its owner. If that dies of it too, the one after refuses it.

A process of mgpu itself (HTTP) speaks for many clients, and an address may be that of many: they are never shut out.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from mgpu.protocol.internal.process.work_record import WorkRecord, make_record_file

FIRST_S = 1.0
LONGEST_S = {"key:": 64.0, "pid:": 2.0}
"""By the kind of owner. A process is of the server's own user, and other threads of it may be innocent. They give up
after 15 s of silence, and have to get in between two deaths."""
QUIET_S = 60.0
FORGET_S = 600.0
"""A message is forgotten after so long."""


@dataclass(slots=True)
class _Strikes:
    count: int = 0
    last_s: float = 0.0
    until_s: float = 0.0


@dataclass(slots=True)
class _Deaths:
    """Of gateways, while they worked on one message."""

    owner: str
    last_s: float
    count: int = 0


@dataclass(frozen=True, slots=True)
class Blame:
    """Who is shut out for a death."""

    owner: str
    seconds: float
    is_known: bool
    """It is not the first time: shutting it out for longer is the pause that is needed."""


class Culprits:
    """What is known of the deaths of all gateways of a server; owns the memory into which they write."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Make the memory. OSError."""
        self.fd = make_record_file()
        self._record = WorkRecord(self.fd)
        self._clock_s = clock_s
        self._strikes: dict[str, _Strikes] = {}
        self._deaths: dict[bytes, _Deaths] = {}

    def close(self) -> None:
        self._record.close()
        os.close(self.fd)

    def begin(self) -> None:
        """Prepare the memory for another gateway."""
        self._record.clear()

    def had_clients(self) -> bool:
        """Return True if clients could connect to the gateway."""
        return self._record.is_bound()

    def note_death(self) -> Blame | None:
        """Read what the gateway has left. Return who is shut out, if that is known."""
        now_s = self._clock_s()
        work, owner = self._record.work(), self._record.accused()
        self._forget_old(now_s)
        if work is not None:
            owner = work.owner
            deaths = self._deaths.setdefault(work.name, _Deaths(owner, now_s))
            deaths.count, deaths.last_s = deaths.count + 1, now_s
        return self._strike(owner, now_s) if _can_be_shut_out(owner) else None

    def clear(self, name: bytes) -> None:
        """Forget a message that a gateway has handled, and the step of its owner."""
        deaths = self._deaths.pop(name, None)
        if deaths is not None and (strikes := self._strikes.get(deaths.owner)) is not None:
            strikes.count = max(0, strikes.count - 1)

    def shut_out(self) -> dict[str, float]:
        """Return who is to be kept out of the next gateway, and for how many seconds."""
        now_s = self._clock_s()
        return {owner: each.until_s - now_s for owner, each in self._strikes.items() if each.until_s > now_s}

    def died_of(self, once: bool) -> list[bytes]:
        """Return the names of the messages that one gateway has died of, or more than one."""
        return [name for name, each in self._deaths.items() if (each.count == 1) is once]

    def _strike(self, owner: str, now_s: float) -> Blame:
        strikes = self._strikes.setdefault(owner, _Strikes())
        quiet_minutes = int((now_s - strikes.last_s) / QUIET_S)
        strikes.count = max(0, strikes.count - quiet_minutes) + 1
        seconds = min(FIRST_S * 2 ** min(strikes.count - 1, 30), LONGEST_S[owner[:4]])
        strikes.last_s, strikes.until_s = now_s, now_s + seconds
        return Blame(owner, seconds, is_known=strikes.count > 1)

    def _forget_old(self, now_s: float) -> None:
        self._deaths = {name: each for name, each in self._deaths.items() if now_s - each.last_s < FORGET_S}
        self._strikes = {owner: each for owner, each in self._strikes.items() if now_s - each.last_s < FORGET_S}


def _can_be_shut_out(owner: str) -> bool:
    if owner.startswith("pid:"):
        return owner != f"pid:{os.getpid()}" and _parent_of(owner.removeprefix("pid:")) != os.getpid()
    return owner.startswith("key:")


def _parent_of(pid: str) -> int:
    """Return the parent of a process; 0 if it has ended."""
    try:
        with open(f"/proc/{int(pid)}/stat", encoding="latin-1") as file:
            return int(file.read().rpartition(") ")[2].split()[1])
    except (OSError, ValueError):
        return 0
