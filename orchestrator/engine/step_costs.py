"""How long steps take by their tokens, for the room that owners leave each other (scheduler/running_shares.py).

Mean tokens and seconds are kept for each power of two of tokens; what lies between is interpolated.

Example: steps of 8 tokens take 20 ms, and steps of 40 take 60 ms. Beside 8 tokens there is room for 5 more, because a
step of 13.3 is expected to take 27 ms, a third longer.
"""

from itertools import pairwise

SLOWER = 4 / 3
"""How much longer a step may take for the sake of other owners."""
_SMOOTHING = 0.1


class StepCosts:
    """Usual times of steps."""

    def __init__(self) -> None:
        self._usual: dict[int, tuple[float, float]] = {}
        """By power of two: mean tokens, mean seconds."""

    def note(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that is done."""
        size = num_tokens.bit_length()
        tokens, usual_s = self._usual.get(size, (num_tokens, seconds))
        self._usual[size] = (
            tokens + (num_tokens - tokens) * _SMOOTHING,
            usual_s + (seconds - usual_s) * _SMOOTHING,
        )

    def room_beside(self, num_tokens: int) -> int:
        """Return how many tokens a step may have beside so many and take `SLOWER` times as long; at least one.

        Where nothing larger was measured, time grows with tokens.
        """
        points = self._points()
        most_s = SLOWER * _time_at(points, num_tokens)
        for (tokens, usual_s), (next_tokens, next_s) in pairwise(points):
            if next_s > most_s and next_tokens > num_tokens:
                at = tokens + (next_tokens - tokens) * (most_s - usual_s) / (next_s - usual_s)
                return max(1, int(at) - num_tokens)
        if not points:
            return max(1, int((SLOWER - 1) * num_tokens + 1e-9))
        tokens, usual_s = points[-1]
        return max(1, int(tokens * most_s / usual_s) - num_tokens) if usual_s else max(1, num_tokens)

    def _points(self) -> list[tuple[float, float]]:
        """Return tokens and seconds in order; no step is taken to be quicker than a smaller one."""
        points: list[tuple[float, float]] = []
        for size in sorted(self._usual):
            tokens, usual_s = self._usual[size]
            points.append((tokens, max(usual_s, points[-1][1] if points else 0.0)))
        return points


def _time_at(points: list[tuple[float, float]], num_tokens: float) -> float:
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
