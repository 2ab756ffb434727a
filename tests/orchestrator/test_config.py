"""What a server's settings say about the memory that its ranks share."""

import pytest

from harness.servers.server_process import config
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
