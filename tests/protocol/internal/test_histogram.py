"""Counts of values by size."""

from mgpu.protocol.internal.histogram import Histogram


def test_counts_are_cumulative_and_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((1, 5))
    for value in (0.5, 1.0, 7.0):
        histogram.add(value)
    assert histogram.counters("x") == {"x_sum": 8.5, "x_le_1": 2.0, "x_le_5": 2.0, "x_le_inf": 3.0}


def test_a_value_can_be_counted_several_times() -> None:
    histogram = Histogram((1,))
    histogram.add(0.25, count=4)
    assert histogram.counters("x") == {"x_sum": 1.0, "x_le_1": 4.0, "x_le_inf": 4.0}
