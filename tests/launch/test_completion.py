"""What a shell completes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import CompletionItem, ShellComplete

from mgpu.launch import completion
from mgpu.launch.cli import cli
from mgpu.launch.commands.install.completion import PROGRAM, VARIABLE
from mgpu.protocol.discovery import RunningServer


def completions(*words: str) -> list[CompletionItem]:
    return ShellComplete(cli, {}, PROGRAM, VARIABLE).get_completions(list(words[:-1]), words[-1])


def completed(*words: str) -> list[str]:
    return [item.value for item in completions(*words) if item.type == "plain"]


def test_commands_and_options_are_completed() -> None:
    assert completed("ser") == ["serve"]
    assert "--max-seq-len" in completed("serve", "--max-")


@pytest.mark.parametrize(("words", "values"), [
    (["serve", "--quant", ""], ["none", "8", "4", "fp8"]),
    (["plan", "--dtype", "b"], ["bfloat16"]),
    (["serve", "--kv-cache-dtype", ""], ["auto", "fp8"]),
    (["serve", "--device", "c"], ["cuda", "cpu"]),
    (["completion", ""], ["bash", "zsh", "fish"]),
])  # fmt: skip
def test_choices_are_completed(words: list[str], values: list[str]) -> None:
    assert completed(*words) == values


@pytest.mark.parametrize("words", [["serve", "-m"], ["serve"], ["plan", "--model"], ["plan"]])
def test_models_are_the_demo_those_in_the_cache_and_files(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models--Qwen--Qwen3-0.6B", "models--org--with--hyphens", "datasets--a--b", "models--x--empty"):
        (tmp_path / name / "snapshots").mkdir(parents=True)
        if "empty" not in name:
            (tmp_path / name / "snapshots" / "1").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert completed(*words, "") == ["demo", "Qwen/Qwen3-0.6B", "org/with--hyphens"]
    assert completed(*words, "Q") == ["Qwen/Qwen3-0.6B"]
    assert [item.type for item in completions(*words, "./mo")] == ["file"]


@pytest.mark.parametrize(("environ", "folder"), [
    ({"HF_HOME": "/a"}, "/a/hub"), ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"), ({"HF_HUB_CACHE": "/h"}, "/h"),
])  # fmt: skip
def test_the_hub_cache_is_where_its_package_has_it(environ: dict[str, str], folder: str) -> None:
    assert completion.hub_cache(environ) == Path(folder)


def test_a_cache_that_is_missing_completes_nothing(tmp_path: Path) -> None:
    assert completion.models_in_hub_cache({"HF_HOME": str(tmp_path)}) == []


def test_folders_files_and_servers_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [item.type for item in completions("serve", "--keys", "")] == ["dir"]
    assert [item.type for item in completions("serve", "--config", "")] == ["file"]
    assert [item.type for item in completions("chat", "--keys", "")] == ["file"]
    server = RunningServer("ipc:///run/front.sock", 1, "demo", "0")
    monkeypatch.setattr(completion, "running_servers", lambda: [server])
    assert completed("chat", "--endpoint", "ipc") == [server.endpoint]
    assert completed("top", "--endpoint", "tcp") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_prints_a_script_for_the_shell(shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("needs bash")
    done = subprocess.run(
        [sys.executable, "-m", "mgpu", "completion", shell], capture_output=True, text=True, timeout=60, check=True
    )
    assert VARIABLE in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, timeout=60, check=True)


def test_another_shell_is_refused_with_the_choices() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mgpu", "completion", "tcsh"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 64
    assert "bash" in done.stderr
    assert "fish" in done.stderr
