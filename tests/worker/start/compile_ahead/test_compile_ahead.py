"""What is compiled ahead is what a start launches, once, and nothing that fails there keeps a worker from starting."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from triton.runtime._async_compile import active_mode

from harness.models.random_model import write_random_model
from harness.specs import make_spec
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.worker.start.compile_ahead import compile_ahead, triton_internals
from mgpu.worker.start.compile_ahead.compile_ahead import CompileAhead

DENSE = ("[1] none auto", "[1] none fp8", "[1] 4 auto", "[2] 8 auto", "[2] fp8 auto", "[1,1,1] fp8 auto")
SPARSE = ("[1] none auto", "[2] 4 auto")
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "mlp_only_layers": [1],
}  # fmt: skip
DEADLINE_S = 120


@pytest.mark.parametrize(("cases", "changes"), [(DENSE, {}), (SPARSE, EXPERTS)], ids=["dense", "experts"])
def test_every_kernel_that_a_start_launches_is_compiled_ahead(
    tmp_path: Path, cases: tuple[str, ...], changes: dict[str, object]
) -> None:
    model = write_random_model(tmp_path, **{"hidden_size": 256, "intermediate_size": 512} | changes)
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "harness.kernels.compile_ahead_coverage", model, *cases]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["case"] for each in found] == list(cases)
    assert [each["missing"] for each in found] == [[]] * len(cases)
    assert min(each["asked"] for each in found) >= 10


def test_this_triton_has_every_private_part_that_is_used() -> None:
    assert triton_internals.missing_names() == []


def test_one_module_uses_the_private_parts_of_triton() -> None:
    private = ("_async_compile", "triton_key", "_init_handles", "JITFunction")
    texts = {path: path.read_text(encoding="utf-8") for path in compile_ahead.SOURCES.rglob("*.py")}
    users = {path.name for path, text in texts.items() if any(name in text for name in private)}
    assert users == {"triton_internals.py"}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Return a list that grows with every run of `launch_all`; an item says whether the group was then alone."""
    times: list[bool] = []

    @contextmanager
    def compiling(device: torch.device, ranks_here: int) -> Iterator[triton_internals.Outcome]:
        outcome = triton_internals.Outcome()
        yield outcome
        outcome.is_complete = len(times) > 1

    monkeypatch.setattr(compile_ahead, "uses_kernels", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_internals, "start_driver", lambda: None)
    monkeypatch.setattr(triton_internals, "compiling", compiling)
    monkeypatch.setattr(triton_internals, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(CompileAhead, "launch_all", lambda self: times.append(self.group.alone))
    return times


def make_ahead(folder: Path, **changes: object) -> CompileAhead:
    spec = make_spec(write_random_model(folder), [1], **changes)
    return CompileAhead(spec, spec.layout.placement.place_of(0), torch.device("cpu"))


def test_kernels_are_launched_at_every_start_until_all_are_compiled(tmp_path: Path, launches: list[bool]) -> None:
    for times in (1, 2, 2):
        with make_ahead(tmp_path).running():
            assert len(launches) == times
    with make_ahead(tmp_path, quant="4").running():
        assert launches == [True] * 3


def test_a_start_with_all_kernels_does_not_wait_for_triton(
    tmp_path: Path, launches: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # after the second, all are compiled
        with make_ahead(tmp_path).running():
            pass
    monkeypatch.setattr(triton_internals, "start_driver", lambda: pytest.fail("waits"))
    with make_ahead(tmp_path).running():
        assert len(launches) == 2


def test_a_change_of_any_source_of_the_worker_compiles_again(
    tmp_path: Path, launches: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {str(path.relative_to(compile_ahead.SOURCES)) for path in compile_ahead.SOURCES.rglob("*.py")}
    assert {"kernels/attention/decode.py", "layers/linear.py", "models/llama.py", "steps/decode_graphs.py"} <= sources
    kernel = tmp_path / "worker" / "kernels" / "attention" / "decode.py"
    kernel.parent.mkdir(parents=True)
    monkeypatch.setattr(compile_ahead, "SOURCES", tmp_path / "worker")
    for times, text in ((1, "one"), (2, "one"), (2, "one"), (3, "another")):
        kernel.write_text(text)
        with make_ahead(tmp_path).running():
            assert len(launches) == times


def test_what_the_key_leaves_out_are_fields_of_a_spec() -> None:
    assert set(compile_ahead._IRRELEVANT_FIELDS) < {field.name for field in fields(WorkerSpec)}


@pytest.mark.parametrize("name", ["triton.runtime.gone:Mode", "triton.runtime.jit:JITFunction.gone"])
def test_a_triton_without_a_private_part_starts_without_compiling_ahead(
    tmp_path: Path,
    launches: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    monkeypatch.setattr(triton_internals, "NEEDED", (*triton_internals.NEEDED, name))
    with make_ahead(tmp_path).running():
        assert "kernels are compiled one by one: ImportError" in caplog.text
        assert name in caplog.text
    assert launches == []


def test_a_failure_does_not_disturb_the_start(
    tmp_path: Path, launches: list[bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CompileAhead, "launch_all", lambda self: [][0])
    with make_ahead(tmp_path).running():
        assert "cannot be compiled ahead: IndexError" in caplog.text
    assert not list(tmp_path.glob("mgpu-*"))


def test_a_kernel_that_fails_ahead_is_left_to_its_launch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kept = []
    with triton_internals.compiling(torch.device("cpu"), 1) as outcome:
        mode = active_mode.get()
        mode.submit("broken", lambda: [][0], kept.append)
        mode.submit("whole", lambda: Loads(), kept.append)
    assert not outcome.is_complete
    assert [kernel.is_loaded for kernel in kept] == [True]
    assert "1 kernels could not be compiled ahead" in caplog.text
    assert active_mode.get() is None


class Loads:
    is_loaded = False

    def _init_handles(self) -> None:
        self.is_loaded = True
