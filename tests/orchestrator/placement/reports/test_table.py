"""The layout table and its JSON form."""

import json
from dataclasses import replace

from harness.machines import QWEN3_32B, SMOLLM2, cpus, gpus
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text


def test_the_table_has_a_row_per_gpu_with_all_numbers() -> None:
    lines = layout_text(plan(QWEN3_32B, gpus(*[80] * 16), LayoutOptions())).splitlines()
    assert "tensor-parallel over 16 GPUs in bfloat16" in lines[0]
    assert "NCCL is usable and 64 query heads" in lines[0]
    assert lines[1].split() == [
        "rank", "device", "memory", "free/total", "layers", "q", "heads", "KV", "heads", "weights", "KV", "cache", "KV",
        "tokens",
    ]  # fmt: skip
    row = next(line for line in lines if line.startswith("3 "))
    for part in ("cuda[3] Test GPU", "80.0/80.0 GiB", "[0, 64)", "4 [12, 16)", "1 [1, 2) on 2 ranks", "3.9 GiB"):
        assert part in row
    assert any("requests at the full context of 40,960" in line for line in lines)


def test_own_heads_are_told_from_replicated_ones() -> None:
    assert "4 own [4, 8)" in layout_text(plan(QWEN3_32B, gpus(80, 80), LayoutOptions()))


def test_the_peer_matrix_is_printed_for_several_gpus() -> None:
    lines = layout_text(plan(QWEN3_32B, gpus(80, 80, link="pcie"), LayoutOptions())).splitlines()
    start = lines.index("P2P  0    1")
    assert lines[start + 1].split() == ["0", "-", "PCI"]
    assert lines[start + 2].split() == ["1", "PCI", "-"]
    assert "P2P" not in layout_text(plan(SMOLLM2, cpus(3), LayoutOptions()))


def test_boundaries_that_go_through_the_host_are_told_from_the_direct_ones() -> None:
    machine = gpus(80, 80, 80, nccl=False)
    rows = [list(row) for row in machine.links]
    rows[1][2] = rows[2][1] = "none"
    mixed = plan(QWEN3_32B, replace(machine, links=tuple(map(tuple, rows))), LayoutOptions())
    direct = "activations between stages by peer"
    assert f"{direct}, through pinned host memory from rank 1 to 2" in layout_text(mixed)
    assert layout_json(mixed)["staged"] == [[1, 2]]
    assert f"{direct}\n" in layout_text(plan(QWEN3_32B, machine, LayoutOptions()))


def test_notes_come_last() -> None:
    text = layout_text(plan(QWEN3_32B, gpus(80, 80, nccl=False, link="none"), LayoutOptions()))
    assert text.splitlines()[-1].startswith("note: no peer access between GPUs 0 and 1")


def test_the_json_form_holds_the_same_numbers() -> None:
    result = plan(QWEN3_32B, gpus(80, 80, nccl=False), LayoutOptions())
    data = json.loads(json.dumps(layout_json(result)))
    assert (data["mode"], data["reason"]) == ("layer-mapped", "MGPU_NO_NCCL=1")
    assert data["stages"] == [{"layers": [0, 33], "devices": [0]}, {"layers": [33, 64], "devices": [1]}]
    assert [rank["weight_bytes"] for rank in data["ranks"]] == [row.weight_bytes for row in result.rows]
    assert data["kv_tokens"] == min(rank["kv_tokens"] for rank in data["ranks"])
