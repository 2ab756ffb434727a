"""Say in the log which fields of bodies had no effect: a misspelt option would otherwise be noticed by nobody.

Each name is logged once, and again after `MOST_KNOWN` others. There is one line a second at most. So no client can fill
the log, or keep the names of others out of it for long.
"""

import logging
import time
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
MOST_IN_LINE = 8
MOST_KNOWN = 200
NAME_CHARS = 40


class FieldLog:
    """What the log has named."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._known: dict[str, None] = {}
        """The one that was named first is forgotten first."""
        self._next_s = -1.0
        self._left_out = 0

    def note(self, path: str, names: Iterable[str]) -> None:
        """Log those of ``names`` that are not known yet, or count them as left out."""
        new = [name for name in dict.fromkeys(name[:NAME_CHARS] for name in names) if name not in self._known]
        now_s = self._clock_s()
        if not new or now_s < self._next_s:
            self._left_out += len(new)
            return
        self._next_s = now_s + INTERVAL_S
        named, left_out = new[:MOST_IN_LINE], len(new[MOST_IN_LINE:]) + self._left_out
        self._left_out = 0
        for name in named:
            self._known[name] = None
        while len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]
        verb = "the field %s has" if len(named) == 1 else "the fields %s have"
        more = f" ({left_out} more since the last such line)" if left_out else ""
        log.warning(f"%s: {verb} no effect%s", path, ", ".join(map(ascii, named)), more)
