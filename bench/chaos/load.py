"""Streams for the fault tests: clients that compare every token with an undisturbed run."""

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.waiting import wait_until
from mgpu import Client

STANDSTILL_S = 240.0
"""Longest wait for the streams to move on after a fault."""


class Standstill(Exception):
    """Nothing has moved for longer than a fault may last."""


@dataclass(frozen=True)
class Job:
    """One request. Odd numbers are sampled, even ones greedy."""

    prompt: tuple[int, ...]
    max_tokens: int
    number: int

    def options(self) -> dict[str, object]:
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": self.number} if self.number % 2 else {}
        return {"max_tokens": self.max_tokens, "ignore_eos": True, **sampled}


def make_jobs(count: int, longest: int, seed: int = 4, vocab_size: int = 40000) -> list[Job]:
    """Draw prompts of 1 to 200 tokens and answers of up to ``longest``."""
    rng = random.Random(seed)
    return [
        Job(
            tuple(rng.randrange(3, vocab_size) for _ in range(rng.choice([1, 7, 30, 60, 200]))),
            rng.randrange(longest // 2, longest + 1),
            number,
        )
        for number in range(count)
    ]


def undisturbed(endpoint: str, jobs: list[Job]) -> dict[Job, tuple[int, ...]]:
    """Run every job alone; what it gives then it must always give."""
    with Client(endpoint) as client:
        return {job: client.generate(job.prompt, **job.options()).token_ids for job in jobs}  # type: ignore[arg-type]


@dataclass
class Tally:
    """What became of the streams."""

    finished: int = 0
    tokens: int = 0
    lost: int = 0
    repeated: int = 0
    different: int = 0
    problems: list[str] = field(default_factory=list)

    def note(self, job: Job, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
        """Compare a finished stream."""
        self.finished += 1
        self.tokens += len(found)
        if found == expected:
            return
        self.lost += max(0, len(expected) - len(found))
        self.repeated += max(0, len(found) - len(expected))
        self.different += len(expected) == len(found)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=False)))
        self.problems.append(f"job {job.number}: {len(found)} tokens, the first {same} of {len(expected)} as expected")

    def note_error(self, job: Job, expected: tuple[int, ...], count: int, error: Exception) -> None:
        """A stream that ended without its answer."""
        self.lost += len(expected) - count
        self.problems.append(f"job {job.number} after {count} tokens: {type(error).__name__}: {error}")


class Streams:
    """Clients in threads of their own, each with one stream after another, until the block ends."""

    def __init__(self, endpoint: str, expected: dict[Job, tuple[int, ...]], count: int) -> None:
        self.tally = Tally()
        self.pieces = 0
        self.count = count
        self._endpoint = endpoint
        self._expected = expected
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done: Counter[int] = Counter()
        self._going = threading.Event()
        self._going.set()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._going.set()
        for thread in self._threads:
            thread.join(STANDSTILL_S)

    def pause(self) -> None:
        """Let every stream end and begin no other."""
        self._going.clear()

    def go_on(self) -> None:
        self._going.set()

    def wait_for_pieces(self, count: int) -> None:
        """Wait until so many more pieces have come."""
        goal = self.pieces + count
        self._wait(lambda: self.pieces >= goal)

    def wait_for_all(self) -> None:
        """Wait until every stream that runs now has ended and another one has begun."""
        before = dict(self._done)
        numbers = range(len(self._threads))
        self._wait(lambda: all(self._done[number] > before.get(number, 0) for number in numbers))

    def _wait(self, done: Callable[[], bool]) -> None:
        if not wait_until(done, STANDSTILL_S):
            raise Standstill(f"the streams stand still: {self.tally}")

    def _run(self, number: int) -> None:
        jobs = itertools.cycle(random.Random(number).sample(list(self._expected), len(self._expected)))
        with Client(self._endpoint, silence_timeout_s=60.0) as client:
            for job in jobs:
                self._going.wait()
                if self._stop.is_set():
                    return
                self._stream(client, job)
                self._done[number] += 1

    def _stream(self, client: Client, job: Job) -> None:
        found: list[int] = []
        expected = self._expected[job]
        try:
            for piece in client.stream(job.prompt, **job.options()):  # type: ignore[arg-type]
                found += piece.token_ids
                self.pieces += 1
        except Exception as error:  # whatever it is, it is what this program is looking for
            with self._lock:
                self.tally.note_error(job, expected, len(found), error)
            time.sleep(0.2)
            return
        with self._lock:
            self.tally.note(job, expected, tuple(found))
