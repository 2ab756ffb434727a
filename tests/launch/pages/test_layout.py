"""The layout in 80 columns."""

from dataclasses import replace

import pytest

from harness.assertions import assert_has_all
from harness.machines import QWEN3_32B, SMOLLM2, cpus, gpus
from harness.specs import make_facts
from mgpu.launch.pages.layout import WIDTH, layout_for, narrow_layout
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.machine.nvml import Link
from mgpu.orchestrator.placement.planner import LayoutOptions, Plan, plan
from mgpu.orchestrator.placement.reports.table import layout_text

LONG = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition with a name that goes on and on, MIG 1g.24gb"
LARGE = make_facts(q=128, kv=16, layers=126, hidden=16384, width=53248, vocab=256000, context=1 << 20)


def long_names(machine: Machine, each: bool) -> Machine:
    devices = (replace(device, name=f"{LONG} {device.ordinal if each else ''}") for device in machine.devices)
    return replace(machine, devices=tuple(devices))


def check_width(result: Plan) -> None:
    lines = narrow_layout(result).splitlines()
    assert max(map(len, lines)) <= WIDTH == 80, lines
    assert len(lines[0]) <= WIDTH - len("01:58:38 ")


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("nccl", [True, False])
@pytest.mark.parametrize("link", ["nvlink", "pcie", "none"])
def test_every_line_fits_80_columns(count: int, nccl: bool, link: Link) -> None:
    for facts, gib in ((QWEN3_32B, 141.0), (LARGE, 9999.0)):
        machine = long_names(gpus(*[gib] * count, nccl=nccl, link=link, total_gib=gib), each=count % 2 == 0)
        check_width(plan(facts, machine, LayoutOptions(fewer_devices=True)))
        if nccl:
            check_width(plan(facts, machine, LayoutOptions(fewer_devices=True, kv_cache_dtype="fp8", quant="4")))


@pytest.mark.parametrize("count", [16, 64, 128])
def test_many_devices_fit_too(count: int) -> None:
    mixed = gpus(*[900.0] * count)
    links = tuple(tuple("pcie" if a == 0 and b else link for b, link in enumerate(row))
                  for a, row in enumerate(mixed.links))  # fmt: skip
    result = plan(LARGE, long_names(replace(mixed, links=links), each=True), LayoutOptions())
    check_width(result)
    assert "-v shows the matrix" in narrow_layout(result)


def test_ranges_are_written_as_people_write_them() -> None:
    text = narrow_layout(plan(QWEN3_32B, gpus(*[80] * 16), LayoutOptions()))
    row = next(line for line in text.splitlines() if line.startswith("3 "))
    assert row.split()[:8] == ["3", "cuda[3]", "80.0/80.0", "0-63", "12-15", "1", "x2", "3.89"]
    assert "x2: each of these KV heads is on 2 ranks" in text
    assert "GPUs 0-15: Test GPU" in text
    assert "peer access between all 16 GPUs: NVLink" in text


def test_gpus_of_several_kinds_are_named_apart() -> None:
    machine = gpus(80, 80, 80, 80)
    names = ("A", "B", "A", "A")
    machine = replace(machine, devices=tuple(replace(d, name=n) for d, n in zip(machine.devices, names, strict=True)))
    assert_has_all(narrow_layout(plan(QWEN3_32B, machine, LayoutOptions())), "GPUs 0, 2-3: A\n", "GPU 1: B\n")


def test_cpu_workers_and_notes_are_shown() -> None:
    text = narrow_layout(plan(SMOLLM2, replace(cpus(3), notes=("no GPU is visible: running on the CPU",)),
                              LayoutOptions()))  # fmt: skip
    assert_has_all(text, "CPU 2", "note: no GPU is visible", "partial sums by shared-memory")
    assert "peer access" not in text


def test_pairs_that_differ_have_a_matrix() -> None:
    machine = gpus(80, 80, 80, 80)
    rows = [list(row) for row in machine.links]
    rows[0][1] = rows[1][0] = "none"
    text = narrow_layout(plan(QWEN3_32B, replace(machine, links=tuple(map(tuple, rows))), LayoutOptions()))
    assert "P2P  0    1    2    3\n0    -    no   NVL  NVL\n" in text


def test_the_log_has_the_wide_form_where_it_fits() -> None:
    result = plan(QWEN3_32B, gpus(80, 80), LayoutOptions())
    assert layout_for(result, None) == layout_for(result, 1000) == layout_text(result)
    assert layout_for(result, 80) == narrow_layout(result)
