"""What all ranks can hold is what the smallest of them can."""

from mgpu.orchestrator.processes.rank_reports import RankReports
from mgpu.protocol.internal.worker_messages import Loaded
from mgpu.protocol.model.kv_pools import PoolSize


def test_pools_are_the_smallest_of_any_rank_and_never_grow() -> None:
    reports = RankReports()
    reports.keep(0, Loaded(0, 0, 100, 1, 1, 1, num_pages=9))
    reports.keep(1, Loaded(0, 1, 80, 1, 1, 1, num_pages=20))
    assert reports.smallest_pools(None) == PoolSize(80, 9)
    assert reports.smallest_pools(PoolSize(90, 7)) == PoolSize(80, 7)
