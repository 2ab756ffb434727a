"""How long steps take by their tokens, for the room that owners leave each other (scheduler/running_shares.py).

Tokens and seconds are kept for each quarter of a power of two of tokens: the median of the last steps. Coarser sizes
would take steps that are already longer by another owner's tokens for what they are without. A step that was slow for a
reason of its own, such as the first of a size, for which kernels are compiled, teaches nothing. What lies between the
sizes is interpolated. Steps that only decode are kept apart from those that also compute prompts: a token of a prompt
may cost much less than one that is decoded, because nothing has to be chosen after it.

Example: steps of 8 tokens take 20 ms, and steps of 40 take 60 ms. Beside 8 tokens there is room for 8 more, if a step
may take half as long again: one of 16 is expected to take 30 ms.
"""

import statistics
from collections import deque
from itertools import pairwise

LAST_STEPS = 9
"""Of each size, whose median counts."""
LEAST_STEPS = 3
"""Of a size that is known: of fewer, half may be slow ones."""

Points = list[tuple[float, float]]
"""Tokens and seconds, in order."""


class StepCosts:
    """Usual times of steps."""

    def __init__(self) -> None:
        self._decoding, self._with_prompts = _Usual(), _Usual()

    def note(self, num_tokens: int, seconds: float, has_prompt: bool) -> None:
        """Learn from a step that is done."""
        (self._with_prompts if has_prompt else self._decoding).note(num_tokens, seconds)

    def room_beside(self, num_tokens: int, slower: float) -> int:
        """Return how many tokens may be decoded beside so many in a step that takes ``slower`` times as long.

        At least one. Where nothing larger was measured, time grows with tokens. Where the largest that was measured is
        quick enough, twice as many are tried.
        """
        return _room(self._decoding.points(), num_tokens, slower)

    def prompt_room_beside(self, num_tokens: int, slower: float) -> int:
        """Return how many tokens of prompts may be computed beside so many that are decoded, in such a step."""
        decoding = self._decoding.points()
        larger = [each for each in self._with_prompts.points() if each[0] > num_tokens]
        if not larger or not decoding:
            return _room(decoding or larger, num_tokens, slower)
        return _room([(float(num_tokens), _time_at(decoding, num_tokens)), *larger], num_tokens, slower)


class _Usual:
    """Tokens and seconds of the last steps of each size."""

    def __init__(self) -> None:
        self._last: dict[int, deque[tuple[int, float]]] = {}
        """By size, and so are the others."""
        self._points: dict[int, tuple[float, float]] = {}

    def note(self, num_tokens: int, seconds: float) -> None:
        size = _size_of(num_tokens)
        last = self._last.setdefault(size, deque(maxlen=LAST_STEPS))
        last.append((num_tokens, seconds))
        if len(last) >= LEAST_STEPS:
            tokens, times = zip(*last, strict=True)
            self._points[size] = statistics.median(tokens), statistics.median(times)

    def points(self) -> Points:
        return [self._points[size] for size in sorted(self._points)]


def _size_of(num_tokens: int) -> int:
    """Return the number of a size: four for each power of two, such as 16 to 19, 20 to 23, 24 to 27 and 28 to 31."""
    bits = max(1, num_tokens.bit_length())
    return 4 * bits + (num_tokens << 2 >> bits - 1) % 4


def _room(points: Points, num_tokens: int, slower: float) -> int:
    points = _never_quicker(points)
    most_s = slower * _time_at(points, num_tokens)
    for (tokens, usual_s), (next_tokens, next_s) in pairwise(points):
        if next_s > most_s and next_tokens > num_tokens:
            at = tokens + (next_tokens - tokens) * (most_s - usual_s) / (next_s - usual_s)
            return max(1, int(at) - num_tokens)
    largest = points[-1][0] if points else 0.0
    return max(1, int(2 * largest if largest > num_tokens else slower * num_tokens + 1e-9) - num_tokens)


def _never_quicker(points: Points) -> Points:
    """Return points in which no step is quicker than a smaller one."""
    found: Points = []
    for tokens, usual_s in points:
        found.append((tokens, max(usual_s, found[-1][1] if found else 0.0)))
    return found


def _time_at(points: Points, num_tokens: float) -> float:
    """Return the expected time of a step; that of the smallest known, for one that is smaller still."""
    if not points:
        return 0.0
    for (tokens, usual_s), (next_tokens, next_s) in pairwise(points):
        if tokens <= num_tokens <= next_tokens:
            return usual_s + (next_s - usual_s) * (num_tokens - tokens) / (next_tokens - tokens)
    if num_tokens <= points[0][0]:
        return points[0][1]
    tokens, usual_s = points[-1]
    return usual_s * num_tokens / tokens
