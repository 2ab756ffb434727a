"""Layers over GPUs of one kind: equal times where the KV cache keeps its room."""

import pytest

from mgpu.orchestrator.placement.split.layer_map import balanced_stages, map_text, quick_stages

GB = 10**9
LAYER, TABLE = 436_000_000, 1_051_000_000
"""Of Llama 3.1 8B in bfloat16: one layer, and the embedding or the LM head."""


@pytest.mark.parametrize(("count", "expected"), [(2, "0:17;1:15"), (3, "0:12;1:11;2:9"), (4, ""), (8, "")], ids=str)
def test_the_slowest_stage_is_as_quick_as_it_can_be(count: int, expected: str) -> None:
    edges = [TABLE if i in (0, count - 1) else 0 for i in range(count)]
    read = [TABLE if i == count - 1 else 0 for i in range(count)]
    plan = quick_stages(32, range(count), [140 * GB] * count, LAYER, edges, read)
    times = [stage.num_layers * LAYER + extra for stage, extra in zip(plan.stages, read, strict=True)]
    assert max(times) - LAYER < (32 * LAYER + TABLE) / count
    assert expected in ("", map_text(plan))


def test_a_small_gpu_keeps_its_room_for_keys_and_values() -> None:
    edges, read = [TABLE, TABLE], [0, TABLE]
    small = [17 * LAYER + TABLE + GB // 10] * 2
    plan = quick_stages(32, range(2), small, LAYER, edges, read)
    assert plan == balanced_stages(32, range(2), small, LAYER, edges)
