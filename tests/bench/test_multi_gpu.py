"""What `bench/multi_gpu` expects of machines that nobody has at hand: held against the planner on a fake driver."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.model_shapes import TINY, TINY_EXPERTS, TINY_FEW_KV, write_config, write_weights
from bench.multi_gpu.box import Box
from bench.multi_gpu.report import Report
from bench.multi_gpu.tokens import Case, cases, sum_cases, unequal_cases
from harness.machines import FakeGpu, FakeNvml
from mgpu.orchestrator.placement.machine.devices import Machine, find_machine
from mgpu.orchestrator.placement.planner import LayoutOptions, Plan, plan
from mgpu.orchestrator.placement.topology.file import parse_topology
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.expert_facts import ExpertSplit

MODELS = {"own KV heads": TINY, "2 KV heads": TINY_FEW_KV, "experts": TINY_EXPERTS}


def driver(count: int) -> FakeNvml:
    return FakeNvml([FakeGpu(f"GPU-{i}", f"0000:{i:02}:00.0") for i in range(count)])


def planned(case: Case, machine: Machine, folder: Path) -> Plan:
    """Plan a case as its command would, on the devices that it sees."""
    typed = dict(zip(case.arguments[::2], case.arguments[1::2], strict=True))
    tp = int(typed["--tp"]) if "--tp" in typed else None
    topology = parse_topology(case.topology, "case.yaml") if case.topology else None
    asked = {"device_layers": typed.get("-n"), "tp_shares": typed.get("--tp-shares"), "topology": topology}
    split: ExpertSplit | None = "parallel" if typed.get("--experts") == "parallel" else None
    options = LayoutOptions(tp=tp, **asked, experts=split, dtype="float32", max_seq_len=1024, kv_memory=64 << 20)
    facts = read_checkpoint(write_config(folder, MODELS[case.model]), "dummy").facts
    return plan(facts, machine, options)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_every_case_has_the_layout_that_it_is_about(count: int, tmp_path: Path) -> None:
    box = Box("gpus", find_machine("cuda", environ={}, nvml=driver(count)))
    every = [*cases(box), *sum_cases(box), *unequal_cases(box)]
    assert len({case.what for case in every}) == len(every)
    for case in every:
        environ = {**case.place.environ, **case.environ}
        machine = find_machine("cuda", environ=environ, nvml=driver(count))
        # Whether NCCL is installed here does not matter.
        problem = "MGPU_NO_NCCL=1" if "MGPU_NO_NCCL" in environ else ""
        found = planned(case, replace(machine, nccl_problem=problem), tmp_path / case.model)
        assert case.mode in ("", found.mode), case.what
        assert case.transport in ("", found.layout.transport), case.what
        assert case.stage_transport in ("", found.layout.stage_transport), case.what
        assert case.uuids in ((), tuple(row.device.uuid for row in found.rows)), case.what
        assert (found.layout.expert_split == "parallel") == ("--experts" in case.arguments), case.what


def test_workers_that_share_a_gpu_have_the_same_kinds_of_layout(tmp_path: Path) -> None:
    machine = find_machine("cuda", 4, oversubscribe=True, environ={}, nvml=driver(1))
    for case in cases(Box("shared", machine)):
        options = dict(zip(case.place.options[1::2], case.place.options[2::2], strict=True))
        shared = find_machine("cuda", int(options["--workers"]), oversubscribe=True, environ={}, nvml=driver(1))
        assert case.mode in ("", planned(case, shared, tmp_path / case.model).mode), case.what


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_weights_are_a_whole_checkpoint_and_the_same_every_time(dtype: str, tmp_path: Path) -> None:
    folders = [write_weights(tmp_path / name, {**TINY, "torch_dtype": dtype}) for name in ("one", "two")]
    first, second = (sorted(folder.glob("*.safetensors")) for folder in folders)
    assert read_checkpoint(folders[0]).facts.checkpoint_dtype == dtype
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_what_a_measurement_raises_becomes_a_row_and_the_next_one_runs(tmp_path: Path) -> None:
    report = Report({}, tmp_path / "rows.json", rehearsal=False, budget_s=60)
    with report.guard("speed", "one"):
        raise RuntimeError("the server ended\nlog line\nPeerLost: an error of rank 1\nstopped")
    report.number("speed", "two", 3.0, "s", most=2.0)
    report.number("speed", "three", 3.0, "s", least=2.0)
    assert [row.verdict for row in report.rows] == ["FAIL", "missed", "met"]
    assert "an error of rank 1" in report.rows[0].found
    assert not report.is_good
    assert (tmp_path / "rows.json").read_text().count('"verdict"') == 3


def test_nothing_new_is_begun_once_the_budget_is_spent(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({}, None, rehearsal=False, budget_s=0.0)
    assert not report.has_time("speed", "one")
    assert "--budget" in capsys.readouterr().out
