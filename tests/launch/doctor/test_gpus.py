"""Driver, GPUs and sums between pairs: with a driver that is imitated, and real processes on the CPU."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.assertions import assert_has_all
from harness.machines import GIB, FakeGpu, FakeMemory, FakeNvml
from mgpu.launch.doctor import gpus
from mgpu.launch.doctor.finding import Finding
from mgpu.launch.doctor.gpus import check_driver, check_links, check_pairs, check_peer_memory, check_torch, rounds
from mgpu.launch.doctor.probes import Answer, Probe, Trial, run_groups
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.machine.pair_check import NotTried, read_record


def driver(count: int, **facts: Any) -> FakeNvml:
    return FakeNvml([FakeGpu(f"GPU-{index}", f"0{index}") for index in range(count)], **facts)


RIGHT = {"product_is_right": True}


@pytest.fixture(autouse=True)
def torch_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "torch_cuda", lambda: "12.8")
    monkeypatch.setattr(gpus, "_NVIDIA_DEVICE", Path("/nonexistent"))


def machine_of(count: int, **facts: Any) -> Machine:
    _, machine = check_driver({}, driver(count, **facts))
    assert machine is not None
    return machine


def levels(found: Sequence[Finding]) -> dict[str, str]:
    return {each.check: each.level for each in found}


def test_healthy_gpus_are_listed() -> None:
    found, machine = check_driver({}, driver(2))
    assert levels(found) == {"driver": "ok", "CUDA": "ok", "GPU 0": "ok", "GPU 1": "ok"}
    assert machine is not None
    assert "580.95.05" in found[0].text


def test_a_gpu_that_others_use_is_a_warning() -> None:
    busy = FakeNvml([FakeGpu("GPU-0", "0", memory=FakeMemory(80 * GIB, 20 * GIB))])
    assert levels(check_driver({}, busy)[0])["GPU 0"] == "warn"


def test_a_lost_gpu_is_a_failure_with_the_way_out() -> None:
    lost = FakeNvml([FakeGpu("GPU-0", "0"), FakeGpu("GPU-1", "1", lost=True)])
    found, machine = check_driver({}, lost)
    assert machine is None
    assert_has_all(found[-1].text, "GPU 1", "CUDA_VISIBLE_DEVICES=0")
    assert found[-1].level == "FAIL"


def test_hidden_gpus_and_a_missing_driver_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert levels(check_driver({"CUDA_VISIBLE_DEVICES": ""}, driver(2))[0])["GPUs"] == "warn"
    none = driver(0, init_error="Driver Not Loaded")
    assert levels(check_driver({}, none)[0]) == {"driver": "ok"}
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpus, "_NVIDIA_DEVICE", tmp_path / "nvidiactl")
    assert levels(check_driver({}, none)[0]) == {"driver": "FAIL"}


@pytest.mark.parametrize(("built_for", "level"), [
    ("12.8", "ok"), ("13.1", "ok"), ("14.0", "FAIL"), ("none: torch is not built for it", "FAIL"), ("no torch", "FAIL"),
])  # fmt: skip
def test_torch_must_be_built_for_a_cuda_that_the_driver_runs(
    monkeypatch: pytest.MonkeyPatch, built_for: str, level: str
) -> None:
    monkeypatch.setattr(gpus, "torch_cuda", lambda: built_for)
    assert levels(check_driver({}, driver(1))[0])["CUDA"] == level


def test_pairs_without_peer_access_are_named() -> None:
    p2p = {(f"GPU-{a}", f"GPU-{b}", 0): 1 for a, b in ((0, 2), (2, 0))}
    found = list(check_links(machine_of(3, p2p=p2p)))
    assert [(each.level, each.text.split(":")[0]) for each in found] == [
        ("ok", "NVLink between GPUs 0-1, 1-2"), ("warn", "none between GPUs 0-2"),
    ]  # fmt: skip


def test_peer_memory_that_damages_data_or_hangs_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verdicts = {(0, 1): "", (0, 2): "it hangs", (1, 2): "reading damages messages"}
    monkeypatch.setattr(gpus, "try_pairs", lambda machine, pairs, environ: {pair: verdicts[pair] for pair in pairs})
    machine = machine_of(3)
    found = list(check_peer_memory(machine, {}, tmp_path / "record"))
    assert [each.level for each in found] == ["FAIL", "FAIL", "ok"]
    assert_has_all(found[0].text, "GPUs 0 and 2", "it hangs")
    assert_has_all(found[1].text, "GPUs 1 and 2", "reading damages messages")
    assert_has_all(found[2].text, "between GPUs 0-1")
    assert read_record(tmp_path / "record", machine) == verdicts, "servers know it, too"


def test_peer_memory_is_not_tried_without_announced_pairs_or_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> dict[tuple[int, int], str]:
        raise NotTried("libcuda.so.1: no such file")

    monkeypatch.setattr(gpus, "try_pairs", refuse)
    assert list(check_peer_memory(machine_of(1), {}, None)) == []
    (found,) = check_peer_memory(machine_of(2), {}, None)
    assert found.level == "warn"
    assert_has_all(found.text, "not tried", "libcuda")


@pytest.mark.parametrize("count", range(1, 10))
def test_rounds_have_every_pair_once_and_nobody_twice_at_a_time(count: int) -> None:
    found = rounds(count)
    assert sorted(pair for each in found for pair in each) == [
        (a, b) for a in range(count) for b in range(a + 1, count)
    ]
    for each in found:
        players = [player for pair in each for player in pair]
        assert len(players) == len(set(players))


def answering(monkeypatch: pytest.MonkeyPatch, **by_rendezvous: list[Answer]) -> list[list[list[Probe]]]:
    """Let pairs be answered without processes; return what was asked."""
    asked: list[list[list[Probe]]] = []
    right = [Answer({"wrong": [], "bytes_per_s": 2e11})] * 2

    def run(groups: list[list[Probe]], trial: Trial) -> list[list[Answer]]:
        asked.append(groups)
        names = [Path(group[0].arguments[group[0].arguments.index("--rendezvous") + 1]).name for group in groups]
        return [by_rendezvous.get(name.replace("-", "_"), right) for name in names]

    monkeypatch.setattr(gpus, "run_groups", run)
    return asked


def test_every_pair_of_gpus_is_tried_on_its_own_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = answering(
        monkeypatch,
        pair_0_3=[Answer({}, "no answer within 5 s"), Answer({}, "")],
        pair_1_2=[Answer({"wrong": [1, 4097], "bytes_per_s": 1.0}), Answer({"wrong": [], "bytes_per_s": 1.0})],
    )
    found = list(check_pairs(machine_of(4), Trial(tmp_path, {}, 5.0)))
    failed = [each for each in found if each.level == "FAIL"]
    assert len(found) == 6
    assert len(failed) == 2
    assert_has_all(
        " ".join(each.text for each in failed), "between GPUs 0 and 3: no answer", "wrong sums between GPUs 1"
    )
    assert_has_all(" ".join(each.advice for each in failed), "MGPU_NO_NCCL=1", "NCCL_P2P_DISABLE=1")
    assert "200.0 GB/s" in next(each.text for each in found if each.level == "ok")
    first, second = next(group for groups in asked for group in groups if "pair-0-3" in " ".join(group[0].arguments))
    assert (first.arguments[-3:], second.arguments[-3:]) == (("cuda:0", "--rank", "0"), ("cuda:3", "--rank", "1"))
    assert first.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1,GPU-2,GPU-3"


def test_one_gpu_and_a_machine_without_nccl_have_no_pairs(tmp_path: Path) -> None:
    trial = Trial(tmp_path, {}, 5.0)
    assert [each.level for each in check_pairs(machine_of(1), trial)] == ["ok"]
    _, machine = check_driver({"MGPU_NO_NCCL": "1"}, driver(2))
    [found] = check_pairs(machine, trial)
    assert "MGPU_NO_NCCL=1" in found.text


@pytest.mark.parametrize(("devices", "level", "word"), [
    ([RIGHT] * 2, "ok", "2 GPUs"), ([RIGHT], "FAIL", "sees 1 GPUs, the driver 2"),
    ([RIGHT, {"product_is_right": False}], "FAIL", "GPU 1 computes wrong"),
])  # fmt: skip
def test_torch_must_see_all_gpus_and_compute_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, devices: list[dict[str, bool]], level: str, word: str
) -> None:
    answer = Answer({"torch": "2.13", "devices": devices})
    monkeypatch.setattr(gpus, "run_groups", lambda groups, trial: [[answer]])
    [found] = check_torch(machine_of(2), Trial(tmp_path, {}, 5.0))
    assert (found.level, word in found.text) == (level, True)


# Real processes on the CPU


def cpu_trial(tmp_path: Path, deadline_s: float = 120.0) -> Trial:
    return Trial(tmp_path, os.environ, deadline_s)


def test_two_cpu_processes_add_right(tmp_path: Path) -> None:
    [found] = check_pairs(None, cpu_trial(tmp_path))
    assert (found.level, "right sums between two CPU processes" in found.text) == ("ok", True)
    assert not [each for each in tmp_path.iterdir() if each.suffix in (".out", ".err")]


def test_torch_computes_on_the_cpu(tmp_path: Path) -> None:
    [found] = check_torch(None, cpu_trial(tmp_path))
    assert (found.level, "right on the CPU" in found.text) == ("ok", True)


def pair_of(*settings: dict[str, str], rendezvous: Path) -> list[Probe]:
    common = ("pair", "--rendezvous", str(rendezvous), "--rank")
    return [Probe((*common, str(rank)), {**os.environ, **each}) for rank, each in enumerate(settings)]


def test_a_process_that_fails_ends_its_group_and_its_words_are_shown(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    broken = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    [[first, second]] = run_groups([pair_of({}, broken, rendezvous=tmp_path / "r")], cpu_trial(tmp_path, 600.0))
    assert "libcudart.so.12" in second.problem
    assert first.values == {}


def test_processes_that_hang_are_killed_at_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import signal, time\nsignal.signal(15, 1)\ntime.sleep(1000)")
    hanging = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    [answers] = run_groups([pair_of(hanging, hanging, rendezvous=tmp_path / "r")], cpu_trial(tmp_path, 1.0))
    assert [each.problem for each in answers] == ["no answer within 1 s"] * 2
    assert sorted(each.name for each in tmp_path.iterdir() if each.suffix in (".out", ".err")) == []


def test_lines_of_libraries_around_the_answer_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import types\nprint('NCCL version 2.27')\n__version__ = '2'\n"
        "version = types.SimpleNamespace(cuda=None)\ncuda = types.SimpleNamespace(is_available=lambda: False)\n"
        "class Generator:\n    def manual_seed(self, seed): return self\n"
        "class Matrix:\n    def float(self): return self\n    def __matmul__(self, other): return self\n"
        "def randint(*args, **options): return Matrix()\n"
    )
    stand_in = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    [[answer]] = run_groups([[Probe(("devices",), {**os.environ, **stand_in})]], cpu_trial(tmp_path))
    assert answer.values == {"torch": "2", "cuda": None, "devices": []}


def test_a_signal_is_told_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGSEGV)})")
    crashing = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    [[answer]] = run_groups([[Probe(("devices",), {**os.environ, **crashing})]], cpu_trial(tmp_path))
    assert answer.problem == "it ended with signal 11"
