"""What is compiled ahead is what a start launches, once, and nothing that fails there keeps a worker from starting."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from harness.fake_orchestrator import make_spec
from harness.random_model import write_random_model
from mgpu.worker.compile_ahead import start_up as rehearsal
from mgpu.worker.compile_ahead import triton_launches as ahead
from mgpu.worker.compile_ahead.start_up import Rehearsal
from mgpu.worker.ranks.collectives import DryRun, SingleRank

CASES = ("[1] none auto", "[1] none fp8", "[1] 4 auto", "[2] 8 auto", "[1,1,1] fp8 auto")
DEADLINE_S = 120


def test_a_rehearsal_asks_for_every_kernel_that_a_start_launches(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, hidden_size=256, intermediate_size=512)
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "harness.compile_ahead_coverage", model, *CASES]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["case"] for each in found] == list(CASES)
    assert [each["missing"] for each in found] == [[]] * len(CASES)
    assert min(each["asked"] for each in found) >= 10


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Give a list that grows with every time kernels are asked for; its items say whether all could be compiled."""
    times: list[bool] = []

    @contextmanager
    def compiling(device: torch.device, ranks_here: int) -> Iterator[ahead.Outcome]:
        outcome = ahead.Outcome()
        yield outcome
        outcome.is_complete = len(times) > 1

    monkeypatch.setattr(rehearsal, "uses_kernels", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ahead, "start_driver", lambda: None)
    monkeypatch.setattr(ahead, "compiling", compiling)
    monkeypatch.setattr(ahead, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(Rehearsal, "ask", lambda self: times.append(self.group.alone))
    return times


def make_rehearsal(folder: Path, **changes: object) -> Rehearsal:
    spec = make_spec(write_random_model(folder), [1], **changes)
    group = DryRun(SingleRank())
    return Rehearsal(spec, spec.plan.place_of(0), torch.device("cpu"), group, lambda count: pytest.fail("not needed"))


def test_kernels_are_asked_for_until_all_of_them_are_there(tmp_path: Path, asked: list[bool]) -> None:
    for times in (1, 2, 2):
        rehearse = make_rehearsal(tmp_path)
        with rehearse.ahead():
            assert len(asked) == times
        assert not rehearse.group.alone
    with make_rehearsal(tmp_path, quant="4").ahead():
        assert asked == [True] * 3


def test_a_change_of_any_source_of_the_worker_has_kernels_asked_for_again(
    tmp_path: Path, asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {str(path.relative_to(rehearsal.SOURCES)) for path in rehearsal.SOURCES.rglob("*.py")}
    assert {"kernels/attention/decode.py", "layers/linear.py", "models/llama.py", "steps/decode_graphs.py"} <= sources
    kernel = tmp_path / "worker" / "kernels" / "attention" / "decode.py"
    kernel.parent.mkdir(parents=True)
    monkeypatch.setattr(rehearsal, "SOURCES", tmp_path / "worker")
    for times, text in ((1, "one"), (2, "one"), (2, "one"), (3, "another")):
        kernel.write_text(text)
        with make_rehearsal(tmp_path).ahead():
            assert len(asked) == times


def test_a_rehearsal_that_fails_leaves_the_start_alone(
    tmp_path: Path, asked: list[bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Rehearsal, "ask", lambda self: [][0])
    with make_rehearsal(tmp_path).ahead():
        assert "cannot be compiled ahead: IndexError" in caplog.text
    assert not list(tmp_path.glob("mgpu-*"))


def test_a_kernel_that_fails_ahead_is_left_to_its_launch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kept = []
    with ahead.compiling(torch.device("cpu"), 1) as outcome:
        mode = ahead._async_compile.active_mode.get()
        mode.submit("broken", lambda: [][0], kept.append)
        mode.submit("whole", lambda: Loads(), kept.append)
    assert not outcome.is_complete
    assert [kernel.is_loaded for kernel in kept] == [True]
    assert "1 kernels could not be compiled ahead" in caplog.text
    assert ahead._async_compile.active_mode.get() is None


class Loads:
    is_loaded = False

    def _init_handles(self) -> None:
        self.is_loaded = True
