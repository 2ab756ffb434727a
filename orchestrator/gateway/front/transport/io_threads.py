"""The threads of libzmq that serve the front socket: they come after the streams, and what they have worked is known.

They receive and decode all that peers send, before any code of the gateway can refuse it: handshakes, frames of
messages that never end, bytes of other protocols. Where there are fewer cores than busy threads, a flood would take
from workers and engine whatever these threads need for it. So they have a lower priority, as the processes for text
have, and the kernel leaves them a part of a contended core. Each turn of such a thread looks at every connection, so
what others send and are sent is delayed, but moves on. The link to the engine has a context, and so a thread, of its
own.
"""

import os
import time
from contextlib import suppress

NICENESS = 7
"""More than that of the process, and so a fifth of the weight of its own thread. With a tenth, a few dozen handshakes
a second with keys took all of it, and first tokens five times as long."""


def threads_of_process() -> frozenset[int]:
    """Return the numbers of all threads of this process."""
    return frozenset(int(name) for name in os.listdir("/proc/self/task"))


LOOP_S = 0.02
"""Of their time; a turn of such a thread is shorter."""


class IoThreads:
    """Those that a context has started."""

    def __init__(self, numbers: frozenset[int] = frozenset()) -> None:
        self._numbers = numbers
        niceness = os.getpriority(os.PRIO_PROCESS, 0) + NICENESS  # more than the kernel's most is its most
        for number in numbers:
            with suppress(OSError):  # then they compete as others do
                os.setpriority(os.PRIO_PROCESS, number, niceness)

    def worked_s(self) -> float:
        """Return the CPU time that they have used so far. It is exact, and costs a microsecond."""
        return sum(time.clock_gettime(_clock_of(number)) for number in self._numbers)

    def have_caught_up(self, worked_s: float) -> bool:
        """Return whether they have done all that they were told when they had worked for ``worked_s``.

        A thread that was told something runs, or waits for a core, until it has done it.
        """
        return self.worked_s() - worked_s >= LOOP_S or all(map(_is_asleep, self._numbers))


def _is_asleep(number: int) -> bool:
    with open(f"/proc/self/task/{number}/stat", encoding="latin-1") as file:
        return file.read().rpartition(") ")[2].startswith("S")


def _clock_of(number: int) -> int:
    """Return the clock of a thread's CPU time, as pthread_getcpuclockid makes it."""
    return (~number << 3) | 6
