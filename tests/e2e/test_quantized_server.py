"""``--quant`` and ``--kv-cache-dtype`` through a whole server, on layouts that must not change the answer."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.models.random_model import write_random_model
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import Row, Stages, make_batch
from mgpu import Client
from mgpu.launch.server_process import ServerProcess
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.facts import KvCacheDtype
from mgpu.protocol.model.quantization import Quant

PROMPT = [5, 90, 17, 3, 44, 61, 8, 29, 70, 11]
COUNT = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"))


def expected_tokens(folder: Path, quant: Quant, kept: KvCacheDtype = "auto") -> list[int]:
    """Compute the greedy answer in this process, as one worker would."""

    def work(group: ThreadGroup) -> list[int]:
        stages = Stages(read_checkpoint(folder), group, [range(3)], quant=quant, kv_cache_dtype=kept)
        row, ids = Row([*range(32)]), PROMPT
        for _ in range(COUNT):
            logits = stages.step(make_batch([(row, ids[row.done :])], stages.block_size))
            ids = [*ids, int(logits[-1].argmax())]
        return ids[len(PROMPT) :]

    return run_ranks(1, work)[0]


@pytest.mark.parametrize(
    ("quant", "layout", "named"),
    [
        ("8", ["-n", "0:1;1:2"], "linear layers in int8"),
        ("4", ["--workers", "2"], "linear layers in int4, groups of 32"),
    ],
)
def test_a_server_with_quantized_layers_answers_as_one_worker(
    folder: Path, quant: Quant, layout: list[str], named: str
) -> None:
    arguments = ["-m", str(folder), "--device", "cpu", "--kv-memory", "16MiB", "--quant", quant, *layout]
    with ServerProcess(*arguments) as server, Client(server.wait_ready()) as client:
        answer = client.generate(PROMPT, max_tokens=COUNT, ignore_eos=True)
        assert list(answer.token_ids) == expected_tokens(folder, quant)
        assert named in server.output()


def test_a_server_with_a_float8_cache_answers_as_one_worker_also_from_its_prefix_cache(folder: Path) -> None:
    arguments = ["-m", str(folder), "--device", "cpu", "--workers", "2", "--block-size", "4", "--kv-memory", "16MiB"]
    with (
        ServerProcess(*arguments, "--kv-cache-dtype", "fp8") as server,
        Client(server.wait_ready()) as client,
    ):
        answers = [client.generate(PROMPT, max_tokens=COUNT, ignore_eos=True) for _ in range(2)]
        assert [list(answer.token_ids) for answer in answers] == [expected_tokens(folder, "none", "fp8")] * 2
        assert answers[1].usage.cached_tokens == 8
        assert "KV cache in fp8 (e4m3): " in server.output()


def test_a_size_that_cuts_int4_groups_starts_nothing(tmp_path: Path) -> None:
    write_random_model(tmp_path, intermediate_size=192)
    arguments = ["-m", str(tmp_path), "--device", "cpu", "--workers", "4", "--quant", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "mgpu.launch.cli", "serve", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 78
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "MLP width 192 / 4 ranks = 48, not a multiple of 32" in line
    assert "Use --workers 2 instead" in line
    assert line.endswith("or --quant 8, which has no groups")
