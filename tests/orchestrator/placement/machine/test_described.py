"""Machines that the user describes, by counts, sizes and kinds of GPUs."""

import re

import pytest

from harness.machines import GIB, TINY
from mgpu.orchestrator.errors import PlacementError, UserError
from mgpu.orchestrator.placement.machine.described import DESCRIBED_BYTES, described_machine
from mgpu.orchestrator.placement.planner import LayoutOptions, plan


@pytest.mark.parametrize(("text", "sizes"), [
    ("1", [DESCRIBED_BYTES]), ("4", [DESCRIBED_BYTES] * 4), (" 2 ", [DESCRIBED_BYTES] * 2),
    ("141GiB,80GiB", [141 * GIB, 80 * GIB]), ("141GiB, 80 GiB", [141 * GIB, 80 * GIB]), ("24GB", [24 * 10**9]),
    ("1.5GiB", [3 * GIB // 2]), ("80g", [80 * 10**9]), ("512MiB,1TiB", [GIB // 2, 1024 * GIB]),
])  # fmt: skip
def test_machines_can_be_described(text: str, sizes: list[int]) -> None:
    machine = described_machine(text, {})
    assert [device.total_bytes for device in machine.devices] == sizes
    assert machine.kind == "cuda"
    assert machine.nccl
    assert "described" in machine.notes[0]


def test_a_described_machine_without_gpus_is_the_cpu() -> None:
    assert described_machine("0", {}).kind == "cpu"


def test_a_described_machine_obeys_the_nccl_switch() -> None:
    assert not described_machine("2", {"MGPU_NO_NCCL": "1"}).nccl


@pytest.mark.parametrize(
    "text", ["-1", "four", "80GiB,", ",", "80GiB;80GiB", "0GiB", "80XB", "1e9", "99999", "9" * 50, "80GiBx4"]
)
def test_descriptions_that_make_no_sense_are_errors(text: str) -> None:
    with pytest.raises(UserError, match="--gpus"):
        described_machine(text, {})


@pytest.mark.parametrize(("text", "names", "link"), [
    ("2xH200", ["H200"] * 2, "nvlink"), ("H100", ["H100"], "nvlink"),
    ("h100 pcie, H100-PCIE", ["H100 PCIe"] * 2, "pcie"),
    ("2 x RTX 4090", ["RTX 4090"] * 2, "none"), ("2*4090,1x3090", ["RTX 4090"] * 2 + ["RTX 3090"], "none"),
    ("4x24GiB", ["described GPU"] * 4, "nvlink"), ("H200,L40S", ["H200", "L40S"], "pcie"),
])  # fmt: skip
def test_kinds_have_their_memory_and_their_links(text: str, names: list[str], link: str) -> None:
    machine = described_machine(text, {})
    assert [device.name for device in machine.devices] == names
    assert {each for row in machine.links for each in row} - {"self"} <= {link}
    assert all(device.total_bytes >= 24 * GIB for device in machine.devices)


def test_an_unknown_kind_lists_the_known_ones_and_a_large_number_may_be_one() -> None:
    with pytest.raises(UserError, match=r"known kinds: B200, .*H200.*RTX 4090"):
        described_machine("2xH300", {})
    with pytest.raises(UserError, match=r"did you mean RTX 4090\? .*known kinds"):
        described_machine("2xrtx 409", {})
    with pytest.raises(UserError, match="write 1x4090"):
        described_machine("4090", {})


@pytest.mark.parametrize(("text", "advised"), [
    ("3", "2"), ("3x80GiB", "2"), ("3x24GiB", "2x24GiB"), ("3xH200", "2xH200"),
    ("1.5GiB,1GiB,1GiB", "1x1536MiB,1x1GiB"), ("2xT4,1xL4", "2xT4"), ("3xA100 40GB", "'2xA100 40GB'"),
])  # fmt: skip
def test_the_way_out_on_a_described_machine_is_another_description(text: str, advised: str) -> None:
    with pytest.raises(PlacementError) as refused:
        plan(TINY, described_machine(text, {}), LayoutOptions())
    assert f"Use --gpus {advised} instead," in str(refused.value)
    assert not re.search("CUDA_VISIBLE_DEVICES|--tp", str(refused.value))
    fewer = described_machine(advised.strip("'"), {}).devices
    assert [each.total_bytes for each in fewer] == [
        each.total_bytes for each in described_machine(text, {}).devices[:2]
    ]
