"""Honest clients beside an attack: streams that are compared token for token, and a prober of first tokens."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.attack.speakers import Speaker
from bench.chaos.load import Job

PROBE_PAUSE_S = 0.2
WARM_PROBES = 5


@dataclass
class Window:
    """What honest clients saw for a while."""

    began_s: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def median_first_token_s(self) -> float:
        return statistics.median(self.first_token_s) if self.first_token_s else float("inf")

    @property
    def worst_first_token_s(self) -> float:
        return max(self.first_token_s, default=float("inf"))


class Honest:
    """``count`` streams without end and one prober; `watch` says what they see in the next seconds."""

    def __init__(self, connect: Callable[[], Speaker], expected: Mapping[Job, object], count: int) -> None:
        self._connect = connect
        self._expected = expected
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._window = Window()
        self.lost = self.different = self.finished = 0
        targets = [self._stream] * count + [self._probe]
        self._threads = [threading.Thread(target=each, args=(at,), daemon=True) for at, each in enumerate(targets)]

    def __enter__(self) -> "Honest":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90.0)

    def watch(self, seconds: float) -> Window:
        """Let ``seconds`` pass and return what was seen meanwhile."""
        window = self.begin()
        self._stop.wait(seconds)
        return self.end(window)

    def warm_up(self, within_s: float = 60.0) -> None:
        """Return when the prober has had some first tokens: processes for text are started when first needed."""
        deadline_s = time.monotonic() + within_s
        window = self.begin()
        while len(window.first_token_s) < WARM_PROBES and time.monotonic() < deadline_s:
            self._stop.wait(0.05)

    def wait_for_an_answer(self, within_s: float = 60.0) -> None:
        """Return when a stream has ended for the first time, or after so long: a short attack may be over before."""
        deadline_s = time.monotonic() + within_s
        while not self.finished and time.monotonic() < deadline_s:
            self._stop.wait(0.05)

    def begin(self) -> Window:
        """Begin a window and return it; `end` ends it."""
        window = Window(began_s=time.monotonic())
        with self._lock:
            self._window = window
        return window

    def end(self, window: Window) -> Window:
        with self._lock:
            self._window = Window()
        window.seconds = time.monotonic() - window.began_s
        return window

    def _stream(self, number: int) -> None:
        jobs = list(self._expected)
        with self._connect() as speaker:
            turn = number
            while not self._stop.is_set():
                job = jobs[turn % len(jobs)]
                turn += 1
                try:
                    found = speaker.answer(job, self._note_tokens)
                except Exception as error:  # whatever it is, it is what this program is looking for
                    if self._stop.is_set():
                        return
                    self._note("lost", f"stream {number}: {type(error).__name__}: {error}")
                    time.sleep(0.5)
                    continue
                self.finished += 1
                if found != self._expected[job]:
                    self._note("different", f"stream {number}: job {job.number} gave other tokens")

    def _note_tokens(self, count: int) -> None:
        with self._lock:
            self._window.tokens += count

    def _note(self, what: str, problem: str) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + 1)
            self._window.problems.append(problem)

    def _probe(self, _number: int) -> None:
        with self._connect() as speaker:
            while not self._stop.wait(PROBE_PAUSE_S):
                began_s = time.monotonic()
                try:
                    speaker.greet()
                except Exception as error:  # as above
                    if self._stop.is_set():
                        return
                    self._note("lost", f"the prober: {type(error).__name__}: {error}")
                    continue
                with self._lock:
                    self._window.first_token_s.append(time.monotonic() - began_s)
