"""The file that ranks of one machine share: what is in it, for which plans."""

from itertools import pairwise

from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import PlacementPlan, Stage, Transport
from mgpu.protocol.model.shared_memory_layout import PAGE, RELAY_ROWS, relay_sizes, shared_layout

LIMITS = StepLimits(block_size=16, max_rows=256, max_batch_tokens=8192, max_seq_len=4096)


def layout_of(*stages: int, transport: Transport = "nccl") -> Layout:
    """Return a layout of two layers a stage on so many devices each."""
    devices = iter(range(sum(stages)))
    plan = PlacementPlan(
        tuple(Stage(2 * i, 2 * i + 2, tuple(next(devices) for _ in range(n))) for i, n in enumerate(stages))
    )
    return Layout(plan, "bfloat16", transport, transport)


def test_a_single_stage_needs_no_relay() -> None:
    assert shared_layout(layout_of(4), LIMITS, 4096).relay == ()


def test_every_rank_of_several_stages_has_whole_pages_of_its_own() -> None:
    shared = shared_layout(layout_of(2, 1), LIMITS, 4096)
    ends = [(region.start, region.start + region.nbytes) for region in shared.relay]
    assert len(ends) == 3
    assert all(start % PAGE == end % PAGE == 0 for start, end in ends)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] <= shared.total_bytes


def test_an_inbox_has_a_place_for_every_step_in_flight_and_one_more() -> None:
    sizes = relay_sizes(layout_of(1, 1, 1), LIMITS, 4096)
    assert (sizes.rows, sizes.depth) == (RELAY_ROWS, 5)
    assert sizes.inbox_bytes == 5 * RELAY_ROWS * 4096 * 2
    assert sizes.mailbox_bytes == 8 * 256


def test_gpus_that_share_layers_have_room_for_their_sums() -> None:
    shared = shared_layout(layout_of(2, 1), LIMITS, 4096)
    assert [len(regions) for regions in shared.sums] == [2, 0]
    first, second = shared.sums[0]
    assert first.start + first.nbytes <= second.start < second.start + second.nbytes <= shared.total_bytes
    assert shared_layout(layout_of(2, transport="shared-memory"), LIMITS, 4096).sums == ((),), "CPU workers"
