"""Learn how long steps usually take: when to expect a result, and when the workers count as hung."""

USUAL_FACTOR = 20.0
"""A step that takes this many times its usual time will not end."""
FIRST_FACTOR = 6.0
"""Patience with the first step of a size, in multiples of the shortest deadline: kernels may be compiled for it."""
_SMOOTHING = 0.1


class StepTimes:
    """Usual step times, kept per power of two of tokens: one long prefill says little about decoding."""

    def __init__(self, shortest_s: float) -> None:
        """``shortest_s`` is the least time that any step gets."""
        self._shortest_s = shortest_s
        self._usual_s: dict[int, float] = {}

    def note(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that is done."""
        size = num_tokens.bit_length()
        usual_s = self._usual_s.get(size, seconds)
        self._usual_s[size] = usual_s + (seconds - usual_s) * _SMOOTHING

    def usual_s(self, num_tokens: int) -> float:
        """Return the usual time from a step's publication to its result; 0 when no step of this size was seen."""
        return self._usual_s.get(num_tokens.bit_length(), 0.0)

    def seconds_for(self, num_tokens: int) -> float:
        """Return the time after which a step of so many tokens counts as hung.

        A size that was never seen is estimated from the next smaller one, in proportion to its tokens.
        """
        size = num_tokens.bit_length()
        if size in self._usual_s:
            return max(self._shortest_s, USUAL_FACTOR * self._usual_s[size])
        smaller = max((seen for seen in self._usual_s if seen < size), default=None)
        expected_s = 0.0 if smaller is None else self._usual_s[smaller] * 2 ** (size - smaller)
        return max(FIRST_FACTOR * self._shortest_s, USUAL_FACTOR * expected_s)
