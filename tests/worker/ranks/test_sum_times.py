"""From measured times to the rows that kernels add up."""

import pytest

from mgpu.worker.ranks.sum_times import rows_of_kernels


@pytest.mark.parametrize(
    ("kernels_us", "library_us", "rows"),
    [
        ([5.0, 6.0, 20.0], [9.0, 9.0, 9.0], 8),
        ([5.0, 6.0, 7.0], [9.0, 9.0, 9.0], 64),
        ([9.5, 6.0, 7.0], [9.0, 9.0, 9.0], 0),
        ([5.0, 9.5, 7.0], [9.0, 9.0, 9.0], 1),
    ],
)
def test_kernels_serve_up_to_the_first_size_at_which_they_are_slower(
    kernels_us: list[float], library_us: list[float], rows: int
) -> None:
    assert rows_of_kernels((1, 8, 64), kernels_us, library_us) == rows
