"""How much time clients' messages may take while requests run.

Turns by account divide the gateway's time between those who send messages. They do not leave any to the streams: on a
machine with few cores every second that goes into refusing a flood is one that workers and engine lack. So the time for
messages is earned, at a fifth of what passes, and what is earned and not spent is kept for a tenth of a second's worth
of messages. Where there are fewer than three cores it is 15 % instead: each second of it is one that a worker lacks.
Example: after a quiet while, a burst of 300 requests of 0.25 ms each is served at once. A flood is served
for 0.1 s and then for 0.2 s of each second, in which its account gets the turns that others leave.

While nothing may be spent, those who have cost little are served all the same (`Modest`): who floods has to wait for
what the flood has cost, and who asks a question beside it does not. That is a tenth of the time at most.

What others do for a message is spent too, by estimates: libzmq's own thread receives it, frame by frame, and the engine
works on requests that end before anything has come of them. So is a new connection: its handshake, and the table of it.
"""

import time
from collections.abc import Callable

SHARE, SHARE_OF_FEW_CORES = 0.2, 0.15
FEW_CORES = 2
MOST_S = 0.1
LEAST_S = 0.001
"""With less to spend, nothing is begun."""
MODEST_SHARE = 0.1
"""Of the time, for those who have cost little, while the others wait."""
MODEST_PAUSE_S = 0.01
"""Between two looks for messages of theirs: each reads what floods send too."""
OWN_SHARE, MOST_OWN_S = 0.05, 0.05
"""Who costs less than this share of the time, or has been quiet and costs so much, has cost little."""
FRAME_S, BYTE_S = 1e-6, 0.7e-9
"""What libzmq's thread needs: of a frame its reads, of a byte the copy, or with keys (1e-9) the deciphering."""
CONNECTION_S = 0.0005
"""What it needs, and the gateway itself, for a new connection. With keys about 0.7 ms."""
CANCEL_S = 0.0005
"""What the engine and the workers have done for a request that its client has begun and cancelled."""


def share_beside_streams(num_cores: int) -> float:
    """Return the part of the time that messages may take while requests run."""
    return SHARE_OF_FEW_CORES if num_cores <= FEW_CORES else SHARE


class Pace:
    """The time that is earned and not spent."""

    def __init__(
        self,
        clock_s: Callable[[], float] = time.monotonic,
        share: float = SHARE,
        most_s: float = MOST_S,
        most_debt_s: float | None = None,
    ) -> None:
        """``most_s`` can be saved up, and ``most_debt_s`` be owed; None: as much as can be saved up."""
        self._share, self._most_s = share, most_s
        self._most_debt_s = most_s if most_debt_s is None else most_debt_s
        self._clock_s = clock_s
        self._left_s, self._earned_s = most_s, clock_s()

    def left_s(self) -> float:
        """Return the time that may be spent now; negative after more was spent than there was."""
        now_s = self._clock_s()
        self._left_s = min(self._most_s, self._left_s + (now_s - self._earned_s) * self._share)
        self._earned_s = now_s
        return self._left_s

    def wait_s(self) -> float:
        """Return how long to wait until something may be begun; 0 if that is now."""
        return max(0.0, LEAST_S - self.left_s()) / self._share

    def spend(self, seconds: float) -> None:
        """Note what was spent. By default a debt is at most as large as the credit, and a pause about half a second."""
        self._left_s = max(-self._most_debt_s, self.left_s() - seconds)


class Modest:
    """Who has cost little, and when they are served although the others have to wait."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._pace = Pace(clock_s, MODEST_SHARE)
        self._costs: dict[str, Pace] = {}
        """Of each owner who has cost anything lately."""
        self._floods: set[str] = set()
        """Who has cost much, until all of that is paid for."""
        self._next_s = self._next_sweep_s = 0.0

    def wait_s(self) -> float:
        """Return how long to wait until their messages are looked for; 0 if that is now."""
        return max(self._next_s - self._clock_s(), self._pace.wait_s(), 0.0)

    def spend(self, seconds: float) -> None:
        """Note what a look at their messages has cost."""
        self._next_s = self._clock_s() + MODEST_PAUSE_S
        self._pace.spend(seconds)

    def charge(self, owner: str, seconds: float) -> None:
        """Note what an owner has cost, at any time."""
        found = self._costs.get(owner)
        if found is None:
            found = self._costs[owner] = Pace(self._clock_s, OWN_SHARE, MOST_OWN_S)
        found.left_s()
        found.spend(seconds)
        if found.left_s() <= 0:
            self._floods.add(owner)
        self._sweep()

    def floods(self) -> list[str]:
        """Return the owners that have cost much, and have not been quiet since."""
        self._sweep()
        return list(self._floods)

    def _sweep(self) -> None:
        """Forget who owes nothing any more, from time to time."""
        if (now_s := self._clock_s()) >= self._next_sweep_s:
            self._next_sweep_s = now_s + MOST_OWN_S / OWN_SHARE
            self._costs = {name: each for name, each in self._costs.items() if each.left_s() < MOST_OWN_S}
            self._floods &= self._costs.keys()

    def has(self, owner: str) -> bool:
        """Return whether an owner has cost little."""
        found = self._costs.get(owner)
        return found is None or found.left_s() > 0
