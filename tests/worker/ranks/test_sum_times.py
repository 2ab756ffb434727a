"""From measured times to the rows that kernels add up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mgpu.worker.errors import PeerLost
from mgpu.worker.ranks import sum_times
from mgpu.worker.ranks.agreement import CannotUse
from mgpu.worker.ranks.sum_times import quickest_rows, rows_of_kernels


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


def timed(monkeypatch: pytest.MonkeyPatch, error: Exception | None, library_us: float = 9.0) -> int:
    """Time two ways of which the kernels take 5 us; ``error`` comes instead at 8 rows. Both ranks see the same."""
    limits = SimpleNamespace(dim=16, dtype=torch.float32)
    group: Any = SimpleNamespace(most_rows=64, limits=limits)
    host: Any = SimpleNamespace(all_gather=lambda mine: torch.cat([mine, mine]))
    asked: list[int] = []

    def median_us(_way: object, rows: int, *_: object) -> float:
        asked.append(rows)
        if error is not None and rows == 8:
            raise error
        return 5.0 if asked.count(rows) == 1 else library_us

    monkeypatch.setattr(sum_times, "_median_us", median_us)
    return quickest_rows(group, group, host, torch.device("cpu"))


def test_kernels_serve_where_they_are_quicker_up_to_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(monkeypatch, None) == 64
    assert timed(monkeypatch, None, library_us=4.0) == 0


def test_what_cannot_be_timed_is_not_used_and_the_worker_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotUse, match="sums cannot be timed: out of memory"):
        timed(monkeypatch, RuntimeError("out of memory\nmore"))


def test_a_lost_rank_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerLost):
        timed(monkeypatch, PeerLost("gone"))
