"""Mixtures of experts through servers, with linear or latent attention too: streams, layouts, and a killed worker."""

from pathlib import Path

import psutil
import pytest

from harness.models.tiny_models import make_tiny_model
from harness.waiting import eventually
from mgpu import Client
from mgpu.launch.server_process import ServerProcess


def answers(client: Client, prompts: list[list[int]], kill: psutil.Process | None = None) -> list[list[int]]:
    """Return the greedy answers of prompts that run side by side; a process may be killed once the first has begun."""
    streams = [client.stream(prompt, max_tokens=6 + at % 3, ignore_eos=True) for at, prompt in enumerate(prompts)]
    firsts = [next(stream) for stream in streams]
    if kill is not None:
        kill.kill()
    return [
        [token for piece in (first, *stream) for token in piece.token_ids]
        for first, stream in zip(firsts, streams, strict=True)
    ]


@pytest.mark.parametrize(
    ("family", "layout", "memory"),
    [
        ("deepseek-v3", ["--workers", "2", "--experts", "parallel"], "320KiB"),  # 568 tokens of latents
        ("qwen3.5-moe", ["--workers", "3", "-n", "0:1;1+2:2"], "1MiB"),  # less than 64 streams need
    ],
)
def test_answers_are_those_of_transformers_in_a_crowd_and_after_a_killed_worker(
    tmp_path: Path, family: str, layout: list[str], memory: str
) -> None:
    model = make_tiny_model(family, tmp_path)
    arguments = ["-m", str(model.folder), "--device", "cpu", "--kv-memory", memory, *layout]
    prompts = [model.prompt_ids[at % 8 :] for at in range(64)]
    with ServerProcess(*arguments) as server, Client(server.wait_ready(), silence_timeout_s=60) as client:
        alone = client.generate(model.prompt_ids, max_tokens=8, ignore_eos=True)
        assert list(alone.token_ids) == model.output_ids
        further = client.generate(model.prompt_ids + model.output_ids[:7], max_tokens=1, ignore_eos=True)
        assert (list(further.token_ids), further.usage.cached_tokens) == (model.output_ids[7:], 16)
        together = answers(client, prompts)
        assert together[0] == model.output_ids[:6]
        workers = [each for each in psutil.Process(server.process.pid).children() if "mgpu.worker" in each.cmdline()]
        assert answers(client, prompts, kill=workers[-1]) == together
        eventually(lambda: client.health().state == "ready")
        assert client.health().restarts == 1
        assert "experts: 6 in " in server.output()


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3-moe", ["--workers", "1"]),
        ("gpt-oss", ["--workers", "2", "--tp", "2"]),
        ("gemma4-moe", ["--workers", "2", "-n", "0:1;1:3"]),
    ],
)
def test_experts_on_the_cpu_by_a_topology_file_change_no_answer(tmp_path: Path, family: str, layout: list[str]) -> None:
    model, topology = make_tiny_model(family, tmp_path), tmp_path / "experts.yaml"
    topology.write_text("0-3: {experts: cpu}\n")
    arguments = ["-m", str(model.folder), "--device", "cpu", "--topology", str(topology), *layout]
    with ServerProcess(*arguments) as server, Client(server.wait_ready()) as client:
        alone = client.generate(model.prompt_ids, max_tokens=8, ignore_eos=True)
        assert list(alone.token_ids) == model.output_ids
        prompts = [model.prompt_ids[at:] for at in range(6)]
        assert answers(client, prompts)[0] == model.output_ids[:6]
        assert "on the CPU without their layers: " in server.output()
