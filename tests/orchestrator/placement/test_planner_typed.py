"""Layouts as the user types them: ``--tp`` and ``-n``."""

import re

import pytest

from harness.assertions import assert_has_all
from harness.machines import QWEN3_32B, SMOLLM2, TINY, cpus, gpus
from harness.planning import planned, refusal, shape
from mgpu.protocol.model.placement import Mode, Stage

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
