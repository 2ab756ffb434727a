"""Whose turn it is: items of many owners, served so that each owner gets the same time.

Start-time fair queueing, as in the scheduler's fair_queue.py, but in seconds of real cost. Every owner has a tag, its
virtual time: the seconds that it was served. The owner with the smallest tag is next. What an item costs is known only
afterwards: `take` removes its owner from the line, `charge` moves the tag by what the item has really cost and lets the
owner back in. So refused work counts like any other, and an owner never has two items out at once. An owner that joins
the line starts at the present, the tag that was served last, so that nobody saves up turns.

Example: A floods with messages of 3 ms, and has been served to tag 30 when B, new, sends messages of 0.1 ms. The
present is 27, where A's last message began, so B joins with tag 27. When A's message is done, B is served until its tag
is above 30: 30 of its messages, or all that it has, before A's next one. Ten connections that are one owner have one
tag: they are served together as often as B alone.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

_SLACK = 64
"""Owners that may be remembered with nothing in line before the first sweep."""
_MAX_IDLE = 4096
"""Most owners that are remembered with nothing in line. Beyond that they are forgotten, and so are their debts."""


@dataclass(slots=True, eq=False)
class _Owner(Generic[Item]):
    """What one owner has waiting, and its virtual time."""

    name: str
    tag_s: float
    waiting: deque[tuple[Item, int]] = field(default_factory=deque)
    nbytes: int = 0
    has_entry: bool = False
    """It is in the heap, perhaps with an earlier tag."""
    is_out: bool = False
    """An item of it is being served."""


class FairTurns(Generic[Item]):
    """Waiting items by owner. `take` one, serve it, `charge` its owner."""

    def __init__(self) -> None:
        self._owners: dict[str, _Owner[Item]] = {}
        self._heap: list[tuple[float, int, _Owner[Item]]] = []
        self._entries = 0
        self._now_s = 0.0
        """The present in virtual time: the tag of the owner that was served last."""
        self._sweep_at = _SLACK
        self.nbytes = 0

    def __bool__(self) -> bool:
        """Return whether anything can be taken."""
        return self._head() is not None

    def bytes_of(self, owner: str) -> int:
        """Return the bytes that an owner has waiting."""
        found = self._owners.get(owner)
        return 0 if found is None else found.nbytes

    def largest(self) -> str:
        """Return the owner with the most bytes waiting."""
        return max(self._owners.values(), key=lambda owner: owner.nbytes).name

    def put(self, name: str, item: Item, nbytes: int = 0) -> None:
        """Add an item behind the others of its owner."""
        owner = self._owners.get(name)
        if owner is None:
            owner = self._owners[name] = _Owner(name, self._now_s)
        owner.waiting.append((item, nbytes))
        owner.nbytes += nbytes
        self.nbytes += nbytes
        self._enter(owner)
        if len(self._owners) > self._sweep_at:
            self._forget_idle()

    def take(self) -> tuple[str, Item] | None:
        """Return the item whose turn it is, and its owner; None if none waits. The owner must be charged afterwards."""
        owner = self._head()
        if owner is None:
            return None
        heapq.heappop(self._heap)
        self._now_s = max(self._now_s, owner.tag_s)
        owner.has_entry, owner.is_out = False, True
        item, nbytes = owner.waiting.popleft()
        owner.nbytes -= nbytes
        self.nbytes -= nbytes
        return owner.name, item

    def charge(self, name: str, cost_s: float) -> None:
        """Charge an owner for what was taken, or for what it cost otherwise."""
        owner = self._owners.get(name)
        if owner is None:
            owner = self._owners[name] = _Owner(name, self._now_s)
        owner.tag_s = max(owner.tag_s, self._now_s) + cost_s
        owner.is_out = False
        self._enter(owner)

    def remove(self, name: str, is_meant: Callable[[Item], bool] = lambda _: True) -> list[Item]:
        """Take items of an owner out of line, unserved, and return them."""
        owner = self._owners.get(name)
        if owner is None:
            return []
        removed = [each for each in owner.waiting if is_meant(each[0])]
        owner.waiting = deque(each for each in owner.waiting if not is_meant(each[0]))
        nbytes = sum(each[1] for each in removed)
        owner.nbytes -= nbytes
        self.nbytes -= nbytes
        return [item for item, _ in removed]

    def _enter(self, owner: _Owner[Item]) -> None:
        if owner.waiting and not owner.has_entry and not owner.is_out:
            owner.tag_s, owner.has_entry = max(owner.tag_s, self._now_s), True
            self._push(owner)

    def _push(self, owner: _Owner[Item]) -> None:
        self._entries += 1
        heapq.heappush(self._heap, (owner.tag_s, self._entries, owner))

    def _head(self) -> _Owner[Item] | None:
        while self._heap:
            tag_s, _, owner = self._heap[0]
            if owner.waiting and tag_s == owner.tag_s:
                return owner
            heapq.heappop(self._heap)
            if owner.waiting:  # it was charged meanwhile
                self._push(owner)
            else:
                owner.has_entry = False
        return None

    def _forget_idle(self) -> None:
        """Forget owners that have nothing in line and no debt; if they are many, those with debts too."""
        busy = {name: each for name, each in self._owners.items() if each.waiting or each.is_out or each.has_entry}
        in_debt = {name: each for name, each in self._owners.items() if each.tag_s > self._now_s}
        self._owners = busy | in_debt if len(in_debt) <= _MAX_IDLE else busy
        self._sweep_at = 2 * len(self._owners) + _SLACK
