"""The order of stages on boxes with slow links, imitated as NVML shows them, and maps by measured speed."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from harness.assertions import assert_has_all
from harness.machines import FakeGpu, FakeNvml, gpus
from harness.specs import make_facts
from mgpu.orchestrator.placement.machine.devices import Machine, find_machine
from mgpu.orchestrator.placement.machine.nvml import Link
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.table import layout_text
from mgpu.orchestrator.placement.split.stage_order import crossings, stage_order

LLAMA_8B = make_facts(q=32, kv=8, layers=32, hidden=4096, width=14336, vocab=128256, context=131072)
SWITCH, BRIDGE, NODE, SOCKETS = 10, 30, 40, 50


def box(groups: Sequence[Sequence[int]], inside: int, link: Link = "pcie", between: Link = "pcie") -> Machine:
    """Return a machine whose GPUs are near each other within a group, and across sockets else."""
    count = sum(map(len, groups))
    group_of = {gpu: index for index, group in enumerate(groups) for gpu in group}

    def same(a: int, b: int) -> bool:
        return group_of[a] == group_of[b]

    machine = gpus(*[80] * count, nccl=False)
    links: tuple[tuple[Link, ...], ...] = tuple(
        tuple("self" if a == b else link if same(a, b) else between for b in range(count)) for a in range(count)
    )
    distances = tuple(
        tuple(0 if a == b else inside if same(a, b) else SOCKETS for b in range(count)) for a in range(count)
    )
    return replace(machine, links=links, distances=distances)


@pytest.mark.parametrize(("groups", "inside", "link", "between", "expected"), [
    ([[0, 1], [2, 3]], SWITCH, "pcie", "pcie", [0, 1, 2, 3]),
    ([[0, 2], [1, 3]], SWITCH, "pcie", "pcie", [0, 2, 1, 3]),
    ([[0, 3], [1, 2]], NODE, "pcie", "none", [0, 3, 1, 2]),
    ([[0, 2], [1, 3]], SOCKETS, "nvlink", "none", [0, 2, 1, 3]),  # bridges between pairs
    ([[0, 1, 2, 3]], SWITCH, "nvlink", "nvlink", [0, 1, 2, 3]),
    ([[0, 2, 4, 6], [1, 3, 5, 7]], BRIDGE, "pcie", "pcie", [0, 2, 4, 6, 1, 3, 5, 7]),
    ([[0, 5], [1, 4], [2, 7], [3, 6]], SWITCH, "nvlink", "pcie", [0, 5, 1, 4, 2, 7, 3, 6]),
])  # fmt: skip
def test_slow_links_are_crossed_as_seldom_as_possible(
    groups: list[list[int]], inside: int, link: Link, between: Link, expected: list[int]
) -> None:
    machine = box(groups, inside, link, between)
    assert stage_order(machine, range(len(expected))) == expected
    result = plan(LLAMA_8B, machine, LayoutOptions())
    assert [stage.devices[0] for stage in result.layout.placement.stages] == expected
    if inside < SOCKETS:
        assert crossings(machine, expected) == (len(groups) - 1 if between != "nvlink" else 0)
    assert ("stages in the order of GPUs" in layout_text(result)) == (expected != sorted(expected))


def test_one_odd_link_is_avoided_and_the_matrix_names_what_links_go_over() -> None:
    machine = box([[0, 1, 2]], SWITCH)
    distances = [list(row) for row in machine.distances]
    distances[0][1] = distances[1][0] = SOCKETS
    machine = replace(machine, distances=tuple(map(tuple, distances)))
    assert stage_order(machine, range(3)) == [0, 2, 1]
    assert_has_all(layout_text(plan(LLAMA_8B, machine, LayoutOptions())), "SYS", "PIX")


def test_more_gpus_than_can_be_tried_and_unknown_ways_keep_their_order() -> None:
    assert stage_order(box([range(0, 14, 2), range(1, 14, 2)], SWITCH), range(14)) == list(range(14))
    assert stage_order(gpus(80, 80, 80), [2, 0, 1]) == [2, 0, 1]


class FakeTree(FakeNvml):
    """A driver that knows where GPUs meet, and how busy each is."""

    def nvmlDeviceGetTopologyCommonAncestor(self, first: FakeGpu, second: FakeGpu) -> int:
        return SWITCH if first.bus[:11] == second.bus[:11] else SOCKETS

    def nvmlDeviceGetUtilizationRates(self, handle: FakeGpu) -> object:
        return type("Rates", (), {"gpu": 97 if handle.uuid == "GPU-b" else 0})()


def test_the_driver_is_asked_for_the_tree_and_for_busy_gpus() -> None:
    found = [("a", "00000000:17:00.0"), ("b", "00000000:17:01.0"), ("c", "00000000:9A:00.0")]
    machine = find_machine("cuda", nvml=FakeTree([FakeGpu(f"GPU-{name}", bus) for name, bus in found]), environ={})
    assert machine.distances == ((0, SWITCH, SOCKETS), (SWITCH, 0, SOCKETS), (SOCKETS, SOCKETS, 0))
    assert [device.busy for device in machine.devices] == [0.0, 0.97, 0.0]
    plain = find_machine("cuda", nvml=FakeNvml([FakeGpu("GPU-a", found[0][1])]), environ={})
    assert (plain.distances, plain.devices[0].busy) == ((), 0.0)


# Speed


def counts(machine: Machine, **options: int) -> list[int]:
    stages = plan(LLAMA_8B, machine, LayoutOptions(**options)).layout.placement.stages
    return [stage.num_layers for stage in stages]


def named(machine: Machine, *names: str, speeds: Sequence[float] = ()) -> Machine:
    devices = zip(machine.devices, names, speeds or [1.0] * len(names), strict=True)
    return replace(machine, devices=tuple(replace(each, name=name, speed=speed) for each, name, speed in devices))


def test_a_busy_gpu_gets_fewer_layers_by_what_was_measured_of_it() -> None:
    half = named(gpus(140, 140, nccl=False), "NVIDIA H200", "NVIDIA H200", speeds=[1.0, 0.5])
    assert counts(half) == [23, 9]  # the head costs as much as 2.4 layers
    assert counts(named(half, "NVIDIA H200", "NVIDIA H200")) == [17, 15]
    assert "GPU 1 is busy: 50% of its speed were measured" in layout_text(plan(LLAMA_8B, half, LayoutOptions()))


def test_gpus_of_different_kinds_are_balanced_by_known_speed() -> None:
    mixed = named(gpus(140, 80, nccl=False), "NVIDIA H200", "NVIDIA A100 80GB PCIe")
    first, second = counts(mixed)
    assert first > 1.8 * second
    assert counts(named(gpus(140, 80, nccl=False), "New GPU", "Other GPU")) != [first, second]  # by memory alone


def test_speed_counts_less_than_room_for_the_usual_requests() -> None:
    """The fast GPU has hardly any memory left, so the slow one gets what it could not hold."""
    tight = named(gpus(14, 140, nccl=False, total_gib=141), "NVIDIA H200", "NVIDIA H200", speeds=[1.0, 0.25])
    tight = replace(tight, devices=tuple(replace(each, total_bytes=each.free_bytes) for each in tight.devices))
    assert counts(tight, max_seq_len=4096)[0] < 16
    assert plan(LLAMA_8B, tight, LayoutOptions(max_seq_len=4096)).kv_tokens > 4096
