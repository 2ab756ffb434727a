"""The layout of every model on every machine: the selection table, and every refusal with its way out."""

import itertools
import re
from typing import Any

import pytest

from harness.assertions import assert_has_all
from harness.machines import GIB, QWEN3_32B, SMOLLM2, TINY, cpus, gpus
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import Machine, oversubscribed
from mgpu.orchestrator.placement.planner import LayoutOptions, Plan, plan
from mgpu.orchestrator.placement.split.divisibility import compatible_sizes
from mgpu.orchestrator.placement.split.sizes import step_bytes
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import Mode, PlacementPlan, Stage

NO_KV_CARE = LayoutOptions(max_seq_len=16)


def shape(result: Plan) -> str:
    """Write the stages the way -n does."""
    return ";".join(f"{'+'.join(map(str, s.devices))}:{s.num_layers}" for s in result.layout.placement.stages)


def planned(facts: ModelFacts, machine: Machine, **options: Any) -> Plan:
    return plan(facts, machine, LayoutOptions(**options))


def refusal(facts: ModelFacts, machine: Machine, **options: Any) -> str:
    with pytest.raises(PlacementError) as caught:
        planned(facts, machine, **options)
    return str(caught.value)


def outcome(facts: ModelFacts, machine: Machine) -> Plan | str:
    """Return the plan, or the text of the refusal."""
    try:
        return planned(facts, machine)
    except PlacementError as error:
        return str(error)


# Which sizes a model allows

LLAMA_70B = make_facts(q=64, kv=8, layers=80, hidden=8192, width=28672, vocab=128256, context=131072)
LLAMA_8B = make_facts(q=32, kv=8, layers=32, hidden=4096, width=14336, vocab=128256, context=131072)
LLAMA2_7B = make_facts(q=32, kv=32, layers=32, hidden=4096, width=11008, vocab=32000, context=4096)
QWEN25_05B = make_facts(q=14, kv=2, layers=24, hidden=896, width=4864, head_dim=64, context=32768, tied=True)
QWEN25_7B = make_facts(q=28, kv=4, layers=28, hidden=3584, width=18944, vocab=152064, context=32768)
GEMMA3_270M = make_facts(
    q=4, kv=1, layers=18, hidden=640, width=2048, head_dim=256, vocab=262144, tied=True, architecture="gemma3"
)
ONE_HEAD = make_facts(q=1, kv=1, layers=6, hidden=64, width=128, head_dim=64, vocab=100, context=128)


@pytest.mark.parametrize(("facts", "sizes"), [
    (QWEN3_32B, (1, 2, 4, 8, 16, 32, 64)),
    (LLAMA_70B, (1, 2, 4, 8, 16, 32, 64)),
    (LLAMA_8B, (1, 2, 4, 8, 16, 32)),
    (LLAMA2_7B, (1, 2, 4, 8, 16, 32)),
    (QWEN25_05B, (1, 2, 14)),  # 7 ranks do not share 2 KV heads; 14 shares of the MLP differ by a column
    (QWEN25_7B, (1, 2, 4, 28)),
    (SMOLLM2, (1, 3, 9)),
    (GEMMA3_270M, (1, 2, 4)),
    (ONE_HEAD, (1,)),
    (make_facts(q=6, kv=6, width=6 * 64), (1, 2, 3, 6)),
    (make_facts(q=12, kv=4, width=12 * 64), (1, 2, 4, 12)),
    (make_facts(q=24, kv=3, width=24 * 64), (1, 3, 6, 12, 24)),
])  # fmt: skip
def test_compatible_sizes(facts: ModelFacts, sizes: tuple[int, ...]) -> None:
    assert compatible_sizes(facts) == sizes


def test_a_long_context_is_named_where_it_is_the_reason() -> None:
    """Without 131072 tokens two GPUs, or int8 weights, would do."""
    long = refusal(LLAMA_8B, gpus(16), max_seq_len=131072)
    assert_has_all(long, "does not fit", "For --max-seq-len 131072: ", "With a shorter one, or without it: ")
    first, second = long.split("With a shorter one, or without it: ")
    assert "--quant" not in first.split("For --max-seq-len 131072: ")[1]
    assert_has_all(second, "--quant 8 would fit", "2 GPUs of this size")
    assert "--max-seq-len" not in refusal(LLAMA_8B, gpus(16))
    assert "--max-seq-len" not in refusal(LLAMA_8B, gpus(16), max_seq_len=512)


# The demo, which takes the devices that it splits over


@pytest.mark.parametrize(("count", "stages"), [
    (1, "0:30"), (2, "0:30"), (3, "0+1+2:30"), (4, "0+1+2:30"), (5, "0+1+2:30"), (8, "0+1+2:30"),
    (9, "0+1+2+3+4+5+6+7+8:30"), (16, "0+1+2+3+4+5+6+7+8:30"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_demo_takes_the_most_devices_that_it_splits_over(count: int, stages: str, kind: str) -> None:
    machine = gpus(*[80.0] * count) if kind == "gpu" else cpus(count)
    result = planned(SMOLLM2, machine, fewer_devices=True)
    assert shape(result) == stages
    if result.layout.placement.world_size < count:
        assert_has_all(result.reason, f" of {count}, because 9 query heads and 3 KV heads do not split", "1, 3, 9")
        assert "not used" in result.notes[-1]


def test_the_demo_takes_the_emptiest_devices() -> None:
    assert shape(planned(SMOLLM2, gpus(4, 80, 80, 4, 80, total_gib=80), fewer_devices=True)) == "1+2+4:30"
    assert planned(SMOLLM2, gpus(4, 80, total_gib=80), fewer_devices=True).reason.startswith("GPU 1 of 2, because")


@pytest.mark.parametrize("count", [2, 3, 4, 8, 30])
def test_the_demo_maps_layers_to_all_devices_where_nccl_is_missing(count: int) -> None:
    result = planned(SMOLLM2, gpus(*[80.0] * count, nccl=False), fewer_devices=True)
    assert result.layout.placement.num_stages == count


def test_the_demo_leaves_devices_out_where_layers_are_too_few() -> None:
    result = planned(SMOLLM2, gpus(4, *[80.0] * 31, total_gib=80, nccl=False), fewer_devices=True)
    assert result.layout.placement.num_stages == 30
    assert_has_all(result.reason, "30 of 32 GPUs", "30 layers")
    assert result.notes[-1] == "not used: GPUs 0, 31"


def test_a_size_typed_for_the_demo_is_not_lowered() -> None:
    assert_has_all(refusal(SMOLLM2, gpus(80, 80), tp=2, fewer_devices=True), "9 query heads % 2 = 1", "1, 3, 9")


# The selection table


@pytest.mark.parametrize(("facts", "machine", "mode", "layout"), [
    (QWEN3_32B, gpus(80), "single", "0:64"),
    (QWEN3_32B, gpus(80, nccl=False), "single", "0:64"),
    (QWEN3_32B, gpus(80, 80), "tensor-parallel", "0+1:64"),
    (QWEN3_32B, gpus(*[80] * 4), "tensor-parallel", "0+1+2+3:64"),
    (QWEN3_32B, gpus(*[80] * 8), "tensor-parallel", "0+1+2+3+4+5+6+7:64"),
    (QWEN3_32B, gpus(80, 80, nccl=False), "layer-mapped", "0:33;1:31"),
    (QWEN3_32B, gpus(80, 80, 80, nccl=False), "layer-mapped", "0:22;1:22;2:20"),
    (ONE_HEAD, gpus(8, 8), "layer-mapped", "0:3;1:3"),
    (ONE_HEAD, cpus(2), "layer-mapped", "0:3;1:3"),
    (SMOLLM2, cpus(1), "cpu", "0:30"),
    (SMOLLM2, cpus(3), "tensor-parallel", "0+1+2:30"),
    (GEMMA3_270M, cpus(2), "tensor-parallel", "0+1:18"),
    (GEMMA3_270M, cpus(4), "tensor-parallel", "0+1+2+3:18"),
])  # fmt: skip
def test_default_selection(facts: ModelFacts, machine: Machine, mode: Mode, layout: str) -> None:
    result = plan(facts, machine, NO_KV_CARE)
    assert (result.mode, shape(result)) == (mode, layout)


@pytest.mark.parametrize(
    ("count", "outcome"),
    [(1, "single"), (2, "split"), (3, "refused"), (4, "split"), (6, "refused"), (8, "split"), (16, "replicated")],
)
def test_qwen3_32b_on_any_number_of_gpus(count: int, outcome: str) -> None:
    machine = gpus(*[80] * count)
    if outcome == "refused":
        message = refusal(QWEN3_32B, machine)
        assert_has_all(message, f"{count} GPUs", "64 query heads", "8 KV heads", "1, 2, 4, 8, 16, 32, 64")
        best = 2 if count == 3 else 4
        assert_has_all(message, f"CUDA_VISIBLE_DEVICES={','.join(map(str, range(best)))} ", f"--tp {best}")
        return
    result = planned(QWEN3_32B, machine)
    assert result.mode == ("single" if outcome == "single" else "tensor-parallel")
    assert [row.heads.num_q for row in result.rows] == [64 // count] * count
    assert [row.heads.num_kv for row in result.rows] == [max(1, 8 // count)] * count
    assert [row.heads.kv_replicas for row in result.rows] == [2 if count == 16 else 1] * count
    if count == 16:
        assert [row.heads.kv_start for row in result.rows] == [rank // 2 for rank in range(16)]


@pytest.mark.parametrize(("facts", "machine", "reason"), [
    (QWEN3_32B, gpus(80), "one GPU"),
    (QWEN3_32B, gpus(80, 80), "NCCL is usable and 64 query heads, 8 KV heads"),
    (QWEN3_32B, gpus(80, 80, nccl=False), "MGPU_NO_NCCL=1"),
    (ONE_HEAD, gpus(8, 8), "no tensor-parallel size above 1"),
    (SMOLLM2, cpus(1), "one CPU worker"),
    (SMOLLM2, cpus(3), "9 query heads, 3 KV heads"),
])  # fmt: skip
def test_the_reason_says_why(facts: ModelFacts, machine: Machine, reason: str) -> None:
    assert reason in plan(facts, machine, NO_KV_CARE).reason


# Sizes that do not fit


NARROW = make_facts(q=8, kv=8, layers=2, hidden=64, width=4, head_dim=8, vocab=100, context=64)
REFUSALS: dict[str, tuple[ModelFacts, Machine, dict[str, Any], list[str]]] = {
    "the visible count is never lowered silently":
        (SMOLLM2, gpus(8, 8), {}, ["2 GPUs cannot split", "9 query heads % 2 = 1", "3 KV heads % 2 = 1",
                                   "Compatible sizes: 1, 3, 9.", "CUDA_VISIBLE_DEVICES=0 "]),
    "GPUs are named the way that the driver does":
        (QWEN3_32B, gpus(80, 80, 80, selectors=["4", "6", "7"]), {}, ["CUDA_VISIBLE_DEVICES=4,6 "]),
    "an MLP narrower than the ranks": (NARROW, cpus(8), {}, ["MLP width 4 < 8 ranks"]),
    "--tp of a size that does not fit lists the sizes":
        (QWEN3_32B, gpus(80, 80, 80), {"tp": 3}, ["Compatible sizes: 1, 2, 4, 8, 16, 32, 64.", "--tp 2"]),
    "a stage that cannot be split lists the sizes":
        (QWEN3_32B, gpus(*[80] * 4), {"device_layers": "0+1+2:32;3:32"}, ["64 query heads % 3 = 1", "1, 2, 4, 8"]),
    "more GPUs than layers":
        (TINY, gpus(*[8] * 9, nccl=False, selectors=list("012345678")), {},
         ["9 GPUs", "8 layers", "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7"]),
    "a model that does not fit says what would":
        (QWEN3_32B, gpus(24), {},
         ["24.0 GiB free of 24.0 GiB", "61.0 GiB of weights", "4 GPUs of this size would hold it"]),
    "a busy GPU is named":
        (QWEN3_32B, gpus(80, 10, total_gib=80), {}, ["GPU 1 (Test GPU, 10.0 GiB free of 80.0 GiB)"]),
    "no number of tiny GPUs holds a large model": (QWEN3_32B, gpus(1), {}, ["larger GPUs"]),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "machine", "options", "words"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_has_the_numbers_and_the_way_out(
    facts: ModelFacts, machine: Machine, options: dict[str, Any], words: list[str]
) -> None:
    assert_has_all(refusal(facts, machine, **options), *words)


@pytest.mark.parametrize("text", ["0\x1e:32;1:32", "0:32;1:32\u3000", "0+\x851:64", "\u0661:64"])
def test_only_plain_spaces_may_stand_in_a_layer_map(text: str) -> None:
    """A regular expression knows more spaces and digits than `int` takes."""
    with pytest.raises(PlacementError, match="is not an ordinal:count pair"):
        planned(QWEN3_32B, gpus(80, 80), device_layers=text)


def test_the_error_offers_a_layer_map_that_works() -> None:
    machine = gpus(80, 80, 80)
    match = re.search(r'-n "([^"]+)"', refusal(QWEN3_32B, machine))
    assert match is not None
    assert planned(QWEN3_32B, machine, device_layers=match[1]).mode == "layer-mapped"


@pytest.mark.parametrize(("count", "best"), [(2, 1), (4, 3), (8, 3)])
def test_cpu_workers_are_told_how_many_would_work(count: int, best: int) -> None:
    message = refusal(SMOLLM2, cpus(count))
    assert_has_all(message, f"{count} CPU workers", f"--workers {best} ")
    assert "CUDA" not in message


def test_an_mlp_width_that_does_not_divide_is_split_unevenly() -> None:
    rows = planned(SMOLLM2, cpus(9)).rows
    assert len(rows) == 9
    assert {row.heads.num_q for row in rows} == {1}


def test_a_vocabulary_that_does_not_divide_is_padded() -> None:
    facts = make_facts(q=4, kv=2, layers=2, hidden=64, width=128, head_dim=16, vocab=103, context=64)
    rows = planned(facts, cpus(4)).rows
    assert len({row.weight_bytes for row in rows}) == 1


# --tp


@pytest.mark.parametrize(("size", "mode", "layout"), [(1, "single", "0:64"), (2, "tensor-parallel", "0+1:64")])
def test_tp_takes_the_first_gpus(size: int, mode: Mode, layout: str) -> None:
    result = planned(QWEN3_32B, gpus(80, 80, 80), tp=size)
    assert (result.mode, shape(result), result.reason) == (mode, layout, f"--tp {size}")
    assert any("not used" in note for note in result.notes)


@pytest.mark.parametrize("size", [-1, 4, 100])
def test_tp_beyond_the_visible_gpus_is_refused(size: int) -> None:
    assert_has_all(refusal(QWEN3_32B, gpus(80, 80), tp=size), f"--tp {size}", "2 GPUs")


@pytest.mark.parametrize(("size", "advice"), [
    (2, "use --tp 1, or --workers 2 ("), (3, "use --tp 1, or --workers 2 instead of --tp 3 ("),
    (4, "use --tp 1, or --workers 4 ("), (9, "use --tp 1, or --workers 4 instead of --tp 9 ("),
    (0, "use --tp 1 ("),
])  # fmt: skip
def test_tp_beyond_the_cpu_workers_is_told_only_numbers_that_split_the_model(size: int, advice: str) -> None:
    """TINY has 4 query heads and 2 KV heads: 1, 2 and 4 split it."""
    assert advice in refusal(TINY, cpus(1), tp=size)
    for count in map(int, re.findall(r"--workers (\d+)", advice)):
        assert planned(TINY, cpus(count)).layout.placement.world_size == count


def test_tp_beyond_the_gpus_is_not_told_to_show_more_if_more_would_not_do() -> None:
    assert "use --tp 2 (" in refusal(QWEN3_32B, gpus(80, 80), tp=3)
    assert "use --tp 2, or CUDA_VISIBLE_DEVICES with more" in refusal(QWEN3_32B, gpus(80, 80), tp=4)


def test_a_tp_that_does_not_split_is_answered_by_one_that_does() -> None:
    """Fewer devices would leave what was typed wrong."""
    for machine in (gpus(80, 80, 80), cpus(3), cpus(4)):
        assert ". Use --tp 2, or give" in refusal(TINY, machine, tp=3)
        assert planned(TINY, machine, tp=2).layout.placement.world_size == 2


def test_too_many_workers_are_told_fewer_and_no_tp() -> None:
    """On the CPU --tp alone would find one worker."""
    assert ". Use --workers 2 instead, or give" in refusal(TINY, cpus(3))


def test_tp_without_nccl_goes_over_the_host_and_says_so() -> None:
    result = planned(QWEN3_32B, gpus(80, 80, nccl=False), tp=2)
    assert (result.mode, result.layout.transport) == ("tensor-parallel", "gloo")
    assert any("gloo" in note and "MGPU_NO_NCCL=1" in note for note in result.notes)


# -n


@pytest.mark.parametrize(("text", "mode", "layout"), [
    ("0:32;1:32", "layer-mapped", "0:32;1:32"),
    ("1:64", "single", "1:64"),
    ("0:44;1:20", "layer-mapped", "0:44;1:20"),
    ("2:1;0:62;1:1", "layer-mapped", "2:1;0:62;1:1"),
    (" 0 : 32 ; 1 : 32 ", "layer-mapped", "0:32;1:32"),
    ("0+1:64", "tensor-parallel", "0+1:64"),
    ("0+1:16;2+3:48", "hybrid", "0+1:16;2+3:48"),
    ("3 + 0:16;2:48", "hybrid", "3+0:16;2:48"),
    ("0+1+2+3:64", "tensor-parallel", "0+1+2+3:64"),
])  # fmt: skip
@pytest.mark.parametrize("nccl", [True, False])
def test_a_typed_map_wins(text: str, mode: Mode, layout: str, nccl: bool) -> None:
    result = planned(QWEN3_32B, gpus(*[141] * 4, nccl=nccl), device_layers=text)
    assert (result.mode, shape(result), result.reason) == (mode, layout, f'-n "{text}"')


def test_layers_follow_the_order_of_the_pairs() -> None:
    stages = planned(QWEN3_32B, gpus(141, 141, 141), device_layers="2:10;0:50;1:4").layout.placement.stages
    assert stages == (Stage(0, 10, (2,)), Stage(10, 60, (0,)), Stage(60, 64, (1,)))


@pytest.mark.parametrize("text", [
    "", ";", "0", "0:", ":64", "0:64;", ";0:64", "0:32,1:32", "0:32;;1:32", "0-32", "a:64", "0:b", "0:6.4", "0:-64",
    "-1:64", "0:64:1", "0+:64", "+0:64",
    "0++1:64", "0;1", "0:0x40", "\u0660:64", "0:" + "9" * 40, "0:64\n;", "cuda0:64",
])  # fmt: skip
def test_a_map_of_the_wrong_form_shows_the_right_one(text: str) -> None:
    message = refusal(QWEN3_32B, gpus(80, 80), device_layers=text)
    assert_has_all(message, "ordinal:count", '-n "0:32;1:32"', "64 layers")


@pytest.mark.parametrize(("text", "parts"), [
    ("2:64", ["GPU 2 is not visible", "0 to 1"]),
    ("0:32;7:32", ["GPU 7 is not visible"]),
    ("0:32;0:32", ["GPU 0 is named twice"]),
    ("0+0:64", ["GPU 0 is named twice"]),
    ("0:0;1:64", ["0 layers", "at least 1"]),
    ("0:32;1:31", ["add up to 63", "64 layers", '-n "0:32;1:32"']),
    ("0:64;1:1", ["add up to 65", "64 layers"]),
    ("0:1", ["add up to 1", "64 layers"]),
])  # fmt: skip
def test_a_map_that_cannot_be_says_why_with_the_numbers(text: str, parts: list[str]) -> None:
    assert_has_all(refusal(QWEN3_32B, gpus(80, 80), device_layers=text), text, *parts)


@pytest.mark.parametrize("text", ["0:32;1:32", "nonsense"])
def test_a_map_and_tp_contradict_each_other(text: str) -> None:
    assert "contradict" in refusal(QWEN3_32B, gpus(80, 80), device_layers=text, tp=2)


def test_cpu_workers_can_be_mapped() -> None:
    result = planned(SMOLLM2, cpus(4), device_layers="0:2;1:10;3:17;2:1")
    assert (result.mode, shape(result)) == ("layer-mapped", "0:2;1:10;3:17;2:1")
    assert "CPU worker 4 is not visible" in refusal(SMOLLM2, cpus(4), device_layers="4:30")


# Transports


@pytest.mark.parametrize(("machine", "layers", "expected"), [
    (gpus(80), None, ("none", "none")),
    (gpus(80, 80), None, ("nccl", "none")),
    (gpus(80, 80), "0:4;1:4", ("none", "nccl")),
    (gpus(*[80] * 4), "0+1:4;2+3:4", ("nccl", "nccl")),
    (gpus(80, 80, nccl=False), None, ("none", "peer")),
    (gpus(80, 80, nccl=False, link="pcie"), None, ("none", "peer")),
    (gpus(80, 80, nccl=False, link="none"), None, ("none", "pinned")),
    (gpus(*[80] * 4, nccl=False, link="none"), "0+1:4;2+3:4", ("gloo", "pinned")),
    (oversubscribed(gpus(80), 2), None, ("none", "peer")),
    (oversubscribed(gpus(80), 2), "0+1:8", ("gloo", "none")),
    (oversubscribed(gpus(80), 2), "0:4;1:4", ("none", "peer")),
    (cpus(1), None, ("none", "none")),
    (cpus(2), None, ("shared-memory", "none")),
    (cpus(2), "0:4;1:4", ("none", "shared-memory")),
    (cpus(2, shared_memory=False), None, ("gloo", "none")),
    (cpus(2, shared_memory=False), "0:4;1:4", ("none", "gloo")),
    (cpus(4), "0+1:4;2+3:4", ("shared-memory", "shared-memory")),
])  # fmt: skip
def test_transports(machine: Machine, layers: str | None, expected: tuple[str, str]) -> None:
    result = planned(TINY, machine, device_layers=layers)
    assert (result.layout.transport, result.layout.stage_transport) == expected


def test_staging_through_the_host_is_said_once_naming_the_pairs() -> None:
    result = planned(TINY, gpus(80, 80, 80, nccl=False, link="none"))
    staged = [note for note in result.notes if "pinned host memory" in note]
    assert len(staged) == 1
    assert "0 and 1, 1 and 2" in staged[0]
    direct = planned(TINY, gpus(80, 80, 80, nccl=False))
    assert not any("pinned" in note for note in direct.notes)


def without_access(count: int) -> Machine:
    """GPUs that reach each other's memory, but for 0 and 2."""
    machine = gpus(*[80] * count, nccl=False)
    rows = [list(row) for row in machine.links]
    rows[0][2] = rows[2][0] = "none"
    return Machine(machine.devices, tuple(map(tuple, rows)), "MGPU_NO_NCCL=1")


def test_pairs_that_never_talk_do_not_matter() -> None:
    assert planned(TINY, without_access(3)).layout.stage_transport == "peer"


def test_one_boundary_without_peer_access_leaves_the_others_direct() -> None:
    islands = without_access(4)
    mapped = planned(TINY, islands, device_layers="0:3;2:3;1:2")
    assert (mapped.layout.stage_transport, mapped.layout.staged) == ("peer", ((0, 1),))
    assert any("between GPUs 0 and 2:" in note for note in mapped.notes)
    hybrid = planned(TINY, islands, device_layers="1+0:4;3+2:4")
    assert (hybrid.layout.stage_transport, hybrid.layout.staged) == ("peer", ((1, 3),))
    direct = planned(TINY, islands)
    assert (direct.layout.stage_transport, direct.layout.staged) == ("peer", ())
    nowhere = planned(TINY, gpus(80, 80, nccl=False, link="none"))
    assert (nowhere.layout.stage_transport, nowhere.layout.staged) == ("pinned", ((0, 1),))
    assert (
        planned(TINY, gpus(80, 80, link="none"), device_layers="0:4;1:4").layout.staged == ()
    )  # NCCL finds its own way


# Automatic layer mapping


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize(
    "facts", [QWEN3_32B, LLAMA_70B, SMOLLM2, GEMMA3_270M, TINY], ids=lambda facts: str(facts.vocab_size)
)
def test_equal_gpus_are_filled_as_evenly_as_whole_layers_allow(facts: ModelFacts, count: int) -> None:
    result = plan(facts, gpus(*[80] * count, nccl=False), NO_KV_CARE)
    stages = result.layout.placement.stages
    assert [stage.devices for stage in stages] == [(device,) for device in range(count)]
    assert stages[0].first_layer == 0
    assert stages[-1].end_layer == facts.num_layers
    assert all(before.end_layer == after.first_layer for before, after in itertools.pairwise(stages))
    assert all(stage.num_layers >= 1 for stage in stages)


def best_fullness(facts: ModelFacts, machine: Machine) -> float:
    """Try every division of the layers."""
    count, layers = len(machine.devices), facts.num_layers
    return min(
        fullness(facts, machine, [b - a for a, b in itertools.pairwise([0, *cuts, layers])])
        for cuts in itertools.combinations(range(1, layers), count - 1)
    )


def fullness(facts: ModelFacts, machine: Machine, counts: list[int]) -> float:
    text = ";".join(f"{device}:{count}" for device, count in enumerate(counts))
    rows = planned(facts, machine, device_layers=text, max_seq_len=16).rows
    return max(row.weight_bytes / (row.budget_bytes - (700 << 20)) for row in rows)


@pytest.mark.parametrize("free", [(12, 4), (4, 12), (16, 4, 8), (4, 4, 16, 8)])
@pytest.mark.parametrize("facts", [GEMMA3_270M, TINY], ids=["gemma", "tiny"])
def test_no_other_division_has_a_less_full_fullest_gpu(facts: ModelFacts, free: tuple[float, ...]) -> None:
    machine = gpus(*free, nccl=False)
    counts = [stage.num_layers for stage in plan(facts, machine, NO_KV_CARE).layout.placement.stages]
    assert fullness(facts, machine, counts) == pytest.approx(best_fullness(facts, machine))


def test_unequal_gpus_get_layers_by_their_free_memory() -> None:
    stages = planned(QWEN3_32B, gpus(141, 80, nccl=False)).layout.placement.stages
    assert 1.6 < stages[0].num_layers / stages[1].num_layers < 1.9
    busy = planned(QWEN3_32B, gpus(80, 40, nccl=False, total_gib=80)).layout.placement.stages
    assert busy[0].num_layers > 1.5 * busy[1].num_layers


def test_the_head_costs_the_last_stage_time_but_the_embedding_costs_the_first_none() -> None:
    counts = [
        stage.num_layers for stage in plan(GEMMA3_270M, gpus(8, 8, 8, nccl=False), NO_KV_CARE).layout.placement.stages
    ]
    assert min(counts[:2]) > counts[2]


# Memory


def test_weights_of_all_ranks_add_up_to_the_model() -> None:
    whole = planned(LLAMA2_7B, gpus(80)).rows[0].weight_bytes
    assert whole == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096)
    split = planned(LLAMA2_7B, gpus(*[80] * 4)).rows
    norms = 2 * (32 * 2 * 4096 + 4096)
    assert sum(row.weight_bytes for row in split) == whole + 3 * norms
    mapped = planned(LLAMA2_7B, gpus(*[80] * 4, nccl=False)).rows
    assert sum(row.weight_bytes for row in mapped) == whole


def test_a_tied_embedding_is_held_twice_when_its_stages_are_apart() -> None:
    whole = planned(SMOLLM2, cpus(1)).rows[0].weight_bytes
    mapped = planned(SMOLLM2, cpus(3), device_layers="0:10;1:10;2:10").rows
    assert sum(row.weight_bytes for row in mapped) == whole + 49152 * 576 * 4


def test_replicated_kv_heads_cost_memory_on_every_rank() -> None:
    eight, sixteen = (planned(QWEN3_32B, gpus(*[80] * count)).rows[0] for count in (8, 16))
    assert eight.kv_token_bytes == sixteen.kv_token_bytes == 2 * 64 * 128 * 2


def test_kv_bytes_follow_heads_layers_and_type() -> None:
    row = planned(QWEN3_32B, gpus(80, 80)).rows[0]
    assert row.kv_token_bytes == 2 * 64 * 4 * 128 * 2
    assert row.kv_tokens % 16 == 0
    assert row.weight_bytes + row.reserve_bytes + row.kv_bytes <= 0.9 * 80 * GIB
    assert row.weight_bytes + row.reserve_bytes + row.kv_bytes > 0.89 * 80 * GIB
    assert planned(SMOLLM2, cpus(1)).rows[0].kv_token_bytes == 2 * 30 * 3 * 64 * 4


def test_the_pool_is_the_least_over_the_ranks() -> None:
    result = planned(QWEN3_32B, gpus(141, 80))
    assert result.kv_tokens == result.rows[1].kv_tokens < result.rows[0].kv_tokens
    assert any("smallest bounds" in note for note in result.notes)


def test_requests_are_as_long_as_model_and_pool_allow() -> None:
    assert planned(QWEN3_32B, gpus(80, 80)).limits.max_seq_len == 40960
    tight = planned(QWEN3_32B, gpus(80))
    assert tight.limits.max_seq_len == tight.kv_tokens < 40960
    assert planned(QWEN3_32B, gpus(80, 80), max_seq_len=1000).limits.max_seq_len == 1000


def test_concurrency_at_full_context() -> None:
    result = planned(QWEN3_32B, gpus(80, 80), max_seq_len=10_000)
    assert result.concurrency == result.kv_tokens / 10_000


@pytest.mark.parametrize("length", [0, -5, 40961])
def test_lengths_beyond_the_context_are_refused(length: int) -> None:
    assert_has_all(refusal(QWEN3_32B, gpus(80), max_seq_len=length), str(length), "40960")


def test_a_length_that_does_not_fit_says_what_would() -> None:
    message = refusal(QWEN3_32B, gpus(80), max_seq_len=40960)
    possible = re.search(r"--max-seq-len (\d+) or less", message)
    assert possible is not None
    assert planned(QWEN3_32B, gpus(80), max_seq_len=int(possible[1])).limits.max_seq_len == int(possible[1])
    assert "2 GPUs of this size would hold it" in message


def test_a_cpu_without_enough_memory_is_refused() -> None:
    message = refusal(LLAMA_8B, cpus(1, gib_each=16))
    assert "16.0 GiB" not in message.split("needs")[1]
    assert "bfloat16" in message


def test_a_fixed_kv_pool_is_taken_as_it_is() -> None:
    result = planned(SMOLLM2, cpus(3), kv_memory=64 << 20)
    per_token = 2 * 30 * 1 * 64 * 4
    assert result.kv_tokens == (64 << 20) // per_token // 16 * 16
    assert result.kv_memory == result.kv_tokens * per_token
    assert "100.0 GiB of --kv-memory" in refusal(SMOLLM2, cpus(1), kv_memory=100 * GIB)


def test_workers_on_gpus_measure_their_pool_themselves() -> None:
    assert planned(QWEN3_32B, gpus(80, 80)).kv_memory == 0
    fixed = planned(QWEN3_32B, gpus(80, 80), kv_memory=4 * GIB)
    assert 0 < fixed.kv_memory <= 4 * GIB


def test_cpu_workers_take_a_modest_pool() -> None:
    for row in planned(SMOLLM2, cpus(3, gib_each=64)).rows:
        assert 1.9 * GIB < row.kv_bytes <= 2 * GIB
    for row in planned(SMOLLM2, cpus(3, gib_each=4)).rows:
        assert 0.9 * GIB < row.kv_bytes <= GIB
    uneven = planned(SMOLLM2, cpus(2, gib_each=64), device_layers="0:25;1:5")
    assert uneven.kv_memory == uneven.kv_tokens * uneven.rows[0].kv_token_bytes


@pytest.mark.parametrize(("machine", "options", "expected"), [
    (gpus(80, 80), LayoutOptions(), "bfloat16"),
    (gpus(80, 80), LayoutOptions(dtype="float16"), "float16"),
    (cpus(2), LayoutOptions(), "float32"),
    (cpus(2), LayoutOptions(dtype="bfloat16"), "bfloat16"),
])  # fmt: skip
def test_the_type_follows_the_device_unless_asked(machine: Machine, options: LayoutOptions, expected: str) -> None:
    assert plan(TINY, machine, options).layout.dtype == expected


def test_the_pool_is_never_larger_than_all_requests_could_use() -> None:
    result = planned(TINY, gpus(80), max_rows=4, max_seq_len=100, block_size=16)
    assert result.kv_tokens == 4 * 112


def test_what_others_hold_of_a_gpu_is_not_counted_twice() -> None:
    idle, busy = (planned(TINY, machine).rows[0] for machine in (gpus(80), gpus(60, total_gib=80)))
    assert idle.budget_bytes - busy.budget_bytes == 20 * GIB


def test_workers_that_share_a_gpu_are_planned_on_one_ordinal() -> None:
    result = planned(TINY, oversubscribed(gpus(80, 80), 4), device_layers="0+1:4;2+3:4")
    assert result.layout.placement.stages == (Stage(0, 4, (0, 1)), Stage(4, 8, (0, 1)))
    assert [row.budget_bytes for row in result.rows] == [36 * GIB] * 4


# Every combination


@pytest.mark.parametrize("nccl", [True, False])
@pytest.mark.parametrize("count", range(1, 17))
@pytest.mark.parametrize(
    "facts", [QWEN3_32B, LLAMA_8B, QWEN25_05B, SMOLLM2, GEMMA3_270M, TINY, ONE_HEAD], ids=lambda f: f"{f.num_q_heads}q"
)
def test_any_machine_gives_a_whole_valid_plan_or_an_error(facts: ModelFacts, count: int, nccl: bool) -> None:
    machine = gpus(*[80] * count, nccl=nccl)
    result = outcome(facts, machine)
    if isinstance(result, str):
        assert_has_all(result, str(count), "CUDA_VISIBLE_DEVICES=")
        return
    placement = result.layout.placement
    assert placement.world_size == count == len(result.rows)
    assert sum(stage.num_layers for stage in placement.stages) == facts.num_layers
    assert sorted(device for stage in placement.stages for device in stage.devices) == list(range(count))
    for stage in placement.stages:
        assert len(stage.devices) in compatible_sizes(facts)
    for row in result.rows:
        assert row.device.ordinal == placement.place_of(row.rank).device
        assert row.heads.num_q * (len(placement.stages[row.stage_index].devices)) == facts.num_q_heads
    assert result.kv_tokens >= result.limits.max_seq_len > 0


def test_the_printed_way_out_of_every_refusal_works() -> None:
    for count in range(2, 33):
        result = outcome(QWEN3_32B, gpus(*[80] * count))
        if isinstance(result, str):
            match = re.search(r"CUDA_VISIBLE_DEVICES=([0-9,]+)", result)
            assert match is not None
            fitting = len(match[1].split(","))
            assert planned(QWEN3_32B, gpus(*[80] * fitting)).layout.placement.world_size == fitting
            assert planned(QWEN3_32B, gpus(*[80] * count), tp=fitting).layout.placement.world_size == fitting


def test_a_plan_is_a_pure_function() -> None:
    assert planned(QWEN3_32B, gpus(80, 80)) == planned(QWEN3_32B, gpus(80, 80))
    assert isinstance(planned(TINY, cpus(2)).layout.placement, PlacementPlan)


@pytest.mark.parametrize(("last", "logits"), [(True, 3 * 4 * 4 * 151936 // 2), (False, 0)])
def test_room_for_a_step_counts_every_activation_that_lives_at_once(last: bool, logits: int) -> None:
    queries_keys_values_and_output, gate_up_and_product = (64 + 8 + 8 + 64) * 128 // 2, 3 * 25600 // 2
    width = 4 * 5120 + queries_keys_values_and_output + gate_up_and_product
    assert step_bytes(QWEN3_32B, 2, last, 2, max_batch_tokens=100, max_rows=4) == 100 * width * 2 + logits
