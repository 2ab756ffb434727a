"""What the log says when a server is ready."""

import logging
from dataclasses import replace

import pytest

from harness.servers.server_process import config
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.startup_log import ProgressBar, log_ready, recovered_line
from mgpu.protocol.internal.worker_messages import LoadProgress, Ready


@pytest.mark.parametrize(("blocks", "is_said"), [(64, False), (32, True)])
def test_the_kv_cache_is_named_again_only_if_it_differs_from_the_plan(
    caplog: pytest.LogCaptureFixture, blocks: int, is_said: bool
) -> None:
    planned = replace(config(), layout_table="KV cache: 256 tokens, 1.0 requests")
    limits = Limits(4, 16, 64, 100, num_blocks=blocks)
    with caplog.at_level(logging.INFO):
        log_ready(planned, limits, {}, 1.0)
    assert ("KV cache allocated: 128 tokens, 1.3 requests at the full context of 100" in caplog.text) is is_said


def test_a_slow_disk_has_a_speed_too(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.orchestrator.startup_log.PLAIN_INTERVAL_S", 0.0)
    with caplog.at_level(logging.INFO):
        ProgressBar(world_size=1).show([LoadProgress(0, 0, "weights", 1_100_000, 4_400_000, 2.0)])
    assert caplog.text.endswith("25%  1.1 MB of 4.4 MB, 0.6 MB/s\n")


def test_a_recovery_says_where_its_time_went() -> None:
    ready = [Ready(1, rank, {"rendezvous": 1.0, "weights": 2.0 + rank}, 8_000_000_000, [], 16) for rank in range(2)]
    assert recovered_line(6.25, 1, ready) == (
        "recovered in 6.25 s with 1 sequence  [spawn 2.2 | rendezvous 1.0 | weights 3.0 (16.00 GB, 5.33 GB/s)]"
    )
