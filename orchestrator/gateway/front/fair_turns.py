"""Whose turn it is: items of many owners, served so that each owner gets the same time.

Fair queueing, as in the scheduler's fair_queue.py, but in seconds of real cost. Every owner has a tag, its virtual
time: the seconds that it was served. The owner with the smallest tag is next. What an item costs is known only
afterwards: `take` removes its owner from the line, `charge` moves the tag by what the item has really cost and lets the
owner back in. So refused work counts like any other. An owner that joins the line starts at the present at least, the
tag that was served last, so that nobody saves up turns. The present also moves on by a part of each cost, as if all in
line and one newcomer were served at once. So no endless row of newcomers starves an owner that was served before.

Owners share by turns, and each divides its share among its own parts in the same way: an item belongs to a path of
names, of which the first is the owner. Nobody gains time by having more parts. The last part of a path has the items,
is never part of another path, and never has two items out at once.

Example: A floods with messages of 3 ms, and has been served to tag 30 when B, new, sends messages of 0.1 ms. The
present is 28.5, half-way through A's last message, so B joins with tag 28.5. B is served until its tag is above 30: 15
of its messages, or all that it has, before A's next one. Ten connections of A have the paths (A, 1) to
(A, 10): together they are served as often as B alone.
"""

import heapq
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Generic, TypeVar

Item = TypeVar("Item")
Path = tuple[str, ...]

_SLACK = 64
"""Parts that may be remembered with nothing in line before the first sweep."""
_MAX_IDLE = 4096
"""Most parts that are remembered with nothing in line. Beyond that they are forgotten, and so are their debts."""


class _Part(Generic[Item]):
    """An owner, or a part of one: what waits there, and its virtual time among its siblings."""

    __slots__ = ("entries", "heap", "in_line", "is_in_line", "nbytes", "now_s", "num_out", "num_waiting", "parts",
                 "path", "sweep_at", "tag_s", "waiting")  # fmt: skip

    def __init__(self, path: Path, tag_s: float = 0.0) -> None:
        self.path = path
        self.tag_s = tag_s
        self.is_in_line = False
        """It is in the heap of its parent, perhaps with an earlier tag."""
        self.waiting: deque[tuple[Item, int]] = deque()
        """Of the last part of a path only."""
        self.num_waiting = self.num_out = self.nbytes = 0
        """Here and in all parts: items that wait, that are being served, and the bytes of those that wait."""
        self.parts: dict[str, _Part[Item]] = {}
        self.heap: list[tuple[float, int, _Part[Item]]] = []
        self.entries = 0
        """Of the heap, so far: of equal tags the earlier is first."""
        self.in_line = 0
        """Parts in the heap."""
        self.now_s = 0.0
        """The present in the virtual time of the parts."""
        self.sweep_at = _SLACK

    def part(self, name: str) -> "_Part[Item]":
        found = self.parts.get(name)
        if found is None:
            found = self.parts[name] = _Part((*self.path, name), self.now_s)
            if len(self.parts) > self.sweep_at:
                self._forget_idle()
                self.parts[name] = found
        return found

    @property
    def can_be_taken(self) -> bool:
        """Return whether an item here may be served now."""
        return bool(self.waiting) and not self.num_out if not self.parts else self.head() is not None

    def enter(self, part: "_Part[Item]") -> None:
        if not part.is_in_line and part.can_be_taken:
            part.is_in_line = True
            self.in_line += 1
            self._push(part)

    def leave(self, part: "_Part[Item]") -> None:
        heapq.heappop(self.heap)
        part.is_in_line = False
        self.in_line -= 1

    def head(self) -> "_Part[Item] | None":
        """Return the part whose turn it is, at the front of the heap."""
        while self.heap:
            tag_s, _, part = self.heap[0]
            if not part.can_be_taken:
                self.leave(part)
            elif tag_s == part.tag_s:
                return part
            else:  # it was charged meanwhile
                heapq.heappop(self.heap)
                self._push(part)
        return None

    def leave_out(self, may: Callable[[str], bool]) -> "list[tuple[float, int, _Part[Item]]]":
        """Take the entries out of the heap that come before the first owner who ``may`` have a turn. Put them back."""
        entries = []
        while (part := self.head()) is not None and not may(part.path[0]):
            entries.append(heapq.heappop(self.heap))
        return entries

    def begin(self, part: "_Part[Item]") -> None:
        """Let a part that had nothing here start at the present at least."""
        if not (part.num_waiting or part.num_out):
            part.tag_s = max(part.tag_s, self.now_s)

    def charge(self, part: "_Part[Item]", cost_s: float) -> None:
        self.begin(part)
        part.tag_s += cost_s
        self.now_s += cost_s / (self.in_line + 1 + (not part.is_in_line))

    def _push(self, part: "_Part[Item]") -> None:
        self.entries += 1
        heapq.heappush(self.heap, (part.tag_s, self.entries, part))

    def _forget_idle(self) -> None:
        """Forget parts that have nothing in line and no debt; if they are many, those with debts too."""
        parts = self.parts.items()
        busy = {name: each for name, each in parts if each.num_waiting or each.num_out or each.is_in_line}
        in_debt = {name: each for name, each in parts if each.tag_s > self.now_s}
        self.parts = busy | in_debt if len(in_debt) <= _MAX_IDLE else busy
        self.sweep_at = 2 * len(self.parts) + _SLACK


class FairTurns(Generic[Item]):
    """Waiting items by path. `take` one, serve it, `charge` its path."""

    def __init__(self) -> None:
        self._root: _Part[Item] = _Part(())

    def __bool__(self) -> bool:
        """Return whether anything can be taken."""
        return self._root.head() is not None

    @property
    def nbytes(self) -> int:
        return self._root.nbytes

    def bytes_of(self, path: Path) -> int:
        """Return the bytes that an owner, or a part of one, has waiting."""
        part = self._root
        for name in path:
            found = part.parts.get(name)
            if found is None:
                return 0
            part = found
        return part.nbytes

    def largest(self) -> Path:
        """Return the part with the most bytes waiting, of the owner with the most."""
        part = self._root
        while part.parts:
            part = max(part.parts.values(), key=lambda each: each.nbytes)
        return part.path

    def put(self, path: Path, item: Item, nbytes: int = 0) -> None:
        """Add an item behind the others of its path."""
        line = self._line(path)
        is_first = not line[-1].num_waiting
        if is_first:
            for parent, part in pairwise(line):
                parent.begin(part)
        line[-1].waiting.append((item, nbytes))
        for part in line:
            part.num_waiting += 1
            part.nbytes += nbytes
        if is_first:  # else it is in line, or being served
            _enter(line)

    def take(self, may: Callable[[str], bool] | None = None) -> tuple[Path, Item] | None:
        """Return the item whose turn it is, and its path; None if none waits. The path must be charged afterwards.

        With ``may``, owners for whom it is false are left out.
        """
        left_out = [] if may is None else self._root.leave_out(may)
        line = [self._root]
        while (head := line[-1].head()) is not None:
            line[-1].leave(head)
            line[-1].now_s = max(line[-1].now_s, head.tag_s)
            line.append(head)
        for entry in left_out:
            heapq.heappush(self._root.heap, entry)
        if len(line) == 1:
            return None
        item, nbytes = line[-1].waiting.popleft()
        for part in line:
            part.num_waiting -= 1
            part.num_out += 1
            part.nbytes -= nbytes
        _enter(line)
        return line[-1].path, item

    def take_more(self, path: Path) -> Item | None:
        """Return one more item of a path that was taken and not charged yet; None if none waits there."""
        line = self._line(path)
        if not line[-1].waiting:
            return None
        item, nbytes = line[-1].waiting.popleft()
        for part in line:
            part.num_waiting -= 1
            part.nbytes -= nbytes
        return item

    def charge(self, path: Path, cost_s: float) -> None:
        """Charge a path for what was taken."""
        line = self._line(path)
        _charge(line, cost_s)
        for part in line:
            part.num_out -= 1
        _enter(line)

    def charge_beside(self, path: Path, cost_s: float) -> None:
        """Charge a path for what it cost otherwise."""
        _charge(self._line(path), cost_s)

    def remove(self, path: Path, is_meant: Callable[[Item], bool] = lambda _: True) -> list[Item]:
        """Take items of a path out of line, unserved, and return them."""
        line = self._line(path)
        last = line[-1]
        removed = [each for each in last.waiting if is_meant(each[0])]
        last.waiting = deque(each for each in last.waiting if not is_meant(each[0]))
        for part in line:
            part.num_waiting -= len(removed)
            part.nbytes -= sum(nbytes for _, nbytes in removed)
        return [item for item, _ in removed]

    def _line(self, path: Path) -> "list[_Part[Item]]":
        """Return the root and every part on the way to the end of the path."""
        part = self._root
        line = [part]
        for name in path:
            part = part.parts.get(name) or part.part(name)
            line.append(part)
        return line


def _enter(line: "list[_Part[Item]]") -> None:
    """Let a part back in line, and those above it, the last first: they can be taken if it can."""
    for at in range(len(line) - 1, 0, -1):
        line[at - 1].enter(line[at])


def _charge(line: "list[_Part[Item]]", cost_s: float) -> None:
    for parent, part in pairwise(line):
        parent.charge(part, cost_s)
