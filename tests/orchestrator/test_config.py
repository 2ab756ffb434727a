"""What a server's settings say about the memory that its ranks share, and about their threads."""

from dataclasses import replace

import pytest

from harness.servers.server_process import config
from mgpu.orchestrator import config as server_config
from mgpu.protocol.model.placement import Transport
from mgpu.protocol.model.shared_memory_layout import shared_layout


@pytest.mark.parametrize("transport", ["nccl", "gloo"])
def test_ranks_on_gpus_share_memory_for_sums_beside_any_transport(transport: Transport) -> None:
    gpus = config(ranks_per_stage=2, device_kind="cuda", transport=transport, stage_transport=transport)
    layout = shared_layout(gpus.layout, gpus.limits, gpus.facts.hidden_size)
    assert [len(regions) for regions in layout.sums] == [2]
    assert gpus.shared_bytes == layout.total_bytes


def test_one_rank_and_ranks_that_meet_over_sockets_share_none() -> None:
    assert config(device_kind="cuda").shared_bytes == 0
    assert config(ranks_per_stage=2, transport="gloo", stage_transport="gloo").shared_bytes == 0


def test_ranks_with_experts_on_the_cpu_share_all_cores_but_two_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_config.os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(server_config, "usable_cpus", lambda cores: cores)
    plain = config(ranks_per_stage=2, device_kind="cuda", transport="nccl", stage_transport="nccl")
    assert plain.threads_of(0) == 0
    apart = replace(plain, layout=replace(plain.layout, cpu_experts=(0,)))
    assert [apart.threads_of(rank) for rank in range(2)] == [6, 6]
    assert replace(apart, worker_cpus=(frozenset(range(4)),) * 2).threads_of(0) == 4
