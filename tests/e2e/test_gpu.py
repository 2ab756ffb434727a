"""Real servers on a CUDA device: random models, since a machine with a GPU may have no network."""

from pathlib import Path

import pytest

from bench.model_shapes import LLAMA_8B, write_config
from mgpu import Client
from mgpu.launch.server_process import ServerProcess
from mgpu.orchestrator.placement.machine.devices import find_machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_machine("auto").kind == "cpu", reason="needs a CUDA device"),
]

PROMPTS = [[1 + (37 * i + 11 * n) % 97 for i in range(length)] for n, length in enumerate((3, 20, 65))]


def greedy_tokens(*arguments: str, new_tokens: int = 12) -> list[list[int]]:
    """Serve a model and give the greedy continuations of `PROMPTS`, all asked at once."""
    with ServerProcess(*arguments) as server, Client(server.wait_ready()) as client:
        streams = [client.stream(ids, max_tokens=new_tokens, ignore_eos=True) for ids in PROMPTS]
        return [list(stream.completion().token_ids) for stream in streams]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from harness.models.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model("llama", folder)
    return str(folder)


@pytest.fixture(scope="module")
def cpu_tokens(tiny_folder: str) -> list[list[int]]:
    return greedy_tokens("-m", tiny_folder, "--device", "cpu")


@pytest.mark.parametrize(
    "layout",
    [
        ["--tp", "1"],
        ["--oversubscribe", "--workers", "2", "--tp", "2"],
        ["--oversubscribe", "--workers", "2", "-n", "0:1;1:2"],
    ],
    ids=["one worker", "two workers tensor-parallel on one GPU", "two workers layer-mapped on one GPU"],
)
def test_fp32_tokens_equal_those_of_the_cpu(tiny_folder: str, cpu_tokens: list[list[int]], layout: list[str]) -> None:
    arguments = ["-m", tiny_folder, "--dtype", "float32", "--kv-memory", "64MiB", *layout]
    assert greedy_tokens(*arguments) == cpu_tokens


def test_pinned_staging_gives_the_same_tokens(
    tiny_folder: str, cpu_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGPU_NO_P2P", "1")
    arguments = ["-m", tiny_folder, "--dtype", "float32", "--kv-memory", "64MiB"]
    assert greedy_tokens(*arguments, "--oversubscribe", "--workers", "2", "-n", "0:1;1:2") == cpu_tokens


@pytest.mark.parametrize("quant", ["8", "4", "fp8"])
def test_quantized_fp32_tokens_equal_those_of_the_cpu(tmp_path: Path, quant: str) -> None:
    from harness.models.random_model import write_random_model

    arguments = ["-m", str(write_random_model(tmp_path)), "--dtype", "float32", "--quant", quant]
    expected = greedy_tokens(*arguments, "--device", "cpu")
    assert greedy_tokens(*arguments, "--tp", "1", "--kv-memory", "64MiB") == expected


@pytest.mark.parametrize("layout", [["--tp", "1"], ["--oversubscribe", "--workers", "2", "--tp", "2"]], ids=str)
def test_fp32_tokens_over_a_float8_cache_equal_those_of_the_cpu(tmp_path: Path, layout: list[str]) -> None:
    from harness.models.random_model import write_random_model

    arguments = ["-m", str(write_random_model(tmp_path)), "--dtype", "float32", "--kv-cache-dtype", "fp8"]
    expected = greedy_tokens(*arguments, "--device", "cpu")
    assert greedy_tokens(*arguments, *layout, "--kv-memory", "64MiB") == expected


@pytest.mark.parametrize("quant", ["none", "8", "4", "fp8"])
def test_bf16_serves(tiny_folder: str, quant: str) -> None:
    arguments = ["-m", tiny_folder, "--tp", "1", "--dtype", "bfloat16", "--quant", quant, "--kv-memory", "64MiB"]
    assert all(len(ids) == 12 for ids in greedy_tokens(*arguments))


def test_an_8b_model_with_dummy_weights_serves(tmp_path: Path) -> None:
    arguments = [
        "-m",
        str(write_config(tmp_path, LLAMA_8B)),
        "--load-format",
        "dummy",
        "--tp",
        "1",
        "--max-seq-len",
        "8192",
    ]
    assert all(len(ids) == 12 for ids in greedy_tokens(*arguments))
