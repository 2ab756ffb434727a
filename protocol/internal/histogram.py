"""Counts of values by size, as the stats query carries them and Prometheus reads them."""

from bisect import bisect_left
from collections.abc import Sequence

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5)
"""Bounds for the time between two tokens."""
LONG_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
"""Bounds for times of whole requests and their parts."""


class Histogram:
    """How many values were at most each bound, and the sum of all of them.

    Example: bounds 1 and 5, values 0.5, 1 and 7: counters ``x_le_1`` 2, ``x_le_5`` 2, ``x_le_inf`` 3, ``x_sum`` 8.5.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a value, ``count`` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def counters(self, name: str) -> dict[str, float]:
        """Return the cumulative counts and the sum, under names that begin with ``name``."""
        values, total = {f"{name}_sum": self._sum}, 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            values[f"{name}_le_{bound:g}"] = float(total)
        return values
