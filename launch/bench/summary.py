"""Put many values into few: medians, spreads, percentiles."""

import math
import statistics
from collections.abc import Sequence

Value = str | int | float | None
Row = dict[str, Value]
"""One line of a result: names with units, and what was found; None where nothing can be said."""


def spread(name: str, values: Sequence[float]) -> Row:
    """Give the median under ``name``, and beside it the least and the greatest. ValueError without values."""
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Give the least value that ``percent`` of all values do not exceed (nearest rank); None without values."""
    if not values:
        return None
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return sorted(values)[rank - 1]
