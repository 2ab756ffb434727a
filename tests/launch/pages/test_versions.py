"""What `--version -v` tells."""

import subprocess
import sys
from pathlib import Path

import pytest

import mgpu
from harness.machines import FakeGpu, FakeNvml
from mgpu.launch.pages import versions


def facts(nvml: FakeNvml) -> dict[str, str]:
    return dict(versions.version_facts(nvml))


def test_the_facts_that_a_report_needs_are_there() -> None:
    found = facts(FakeNvml([FakeGpu("GPU-a", "0", name="NVIDIA H200"), FakeGpu("GPU-b", "1", lost=True)]))
    assert found["mgpu"].startswith(mgpu.__version__)
    assert found["driver"] == "580.95.05, for CUDA up to 13.0"
    assert found["GPU 0"] == "NVIDIA H200, 80.0 GiB"
    assert found["GPU 1"] == "GPU is lost"
    assert {"commit", "Python", "platform", "torch", "CUDA", "NCCL", "triton"} <= set(found)


def test_without_a_driver_its_words_are_shown() -> None:
    assert facts(FakeNvml([], init_error="Driver Not Loaded"))["driver"] == "NVML: Driver Not Loaded"


@pytest.mark.parametrize(("line", "text"), [
    ("cuda: Optional[str] = '12.8'", "12.8"), ("cuda = \"13.0\"", "13.0"),
    ("cuda: Optional[str] = None", "none: torch is not built for it"),
])  # fmt: skip
def test_cuda_is_read_from_the_version_file_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, text: str
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2'\n{line}\nhip = '6'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert versions.torch_cuda() == text


def test_a_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert versions.commit_of(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    (tmp_path / "part").mkdir()
    commit = versions.commit_of(tmp_path / "part")
    assert len(commit) == 12
    (tmp_path / "file").write_text("x")
    subprocess.run([*git, "add", "file"], check=True)
    assert versions.commit_of(tmp_path / "part") == f"{commit}+"


@pytest.mark.parametrize("words", [["--version", "-v"], ["-v", "--version"]])
def test_the_command_prints_them_in_any_order(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mgpu", *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(f"mgpu-launch, version {mgpu.__version__}\n")
    assert "torch " in done.stdout


def test_verbose_alone_is_no_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mgpu", "-v"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 64
    assert "Missing command" in done.stderr
