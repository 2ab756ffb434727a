"""Greedy tokens through the whole server equal the reference, in fp32, on every kind of layout."""

from pathlib import Path

import pytest

from harness.answers.golden_prompts import golden
from mgpu import Client
from mgpu.launch.server_process import running_server

TOPOLOGY = "topology.yaml"
HEAD_APART = """
0-30: {device: "cpu[0]"}
13-30: {device: "cpu[1]+cpu[2]+cpu[3]"}
/lm_head/: {device: cpu}
"""
SMOLLM2_LAYOUTS = {
    "tensor-parallel over 2, by unequal shares": ["--tp-shares", "2,1"],
    "a stage of one, a stage of three, and the head apart": ["--topology", TOPOLOGY],
}
GEMMA3_LAYOUTS = {
    "one worker": ["--workers", "1"],
    "KV head on four ranks": ["--workers", "4"],
}


FEW_TOKENS = 10
"""Layouts show their faults in the first tokens, and several workers on few cores take long for each."""


def assert_golden(path: str, name: str, arguments: list[str], max_tokens: int) -> None:
    with running_server("-m", path, "--device", "cpu", "--max-seq-len", "512", *arguments) as endpoint:
        assert_answers(endpoint, name, max_tokens)


def assert_answers(endpoint: str, name: str, max_tokens: int = 32) -> None:
    with Client(endpoint) as client:
        options = {"max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0}
        prompts = golden(name)
        # All at once: steps then mix prompts and rows that decode, and are fewer.
        streams = [client.stream(prompt["prompt_ids"], **options) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            answer = stream.completion()
            assert list(answer.token_ids) == prompt["output_ids"][:max_tokens], prompt["name"]
            assert answer.logprobs is not None
            expected = prompt["output_logprobs"][:max_tokens]
            assert [entry.logprob for entry in answer.logprobs] == pytest.approx(expected, abs=2e-3)


def test_smollm2_on_one_worker_gives_the_golden_tokens(endpoint: str) -> None:
    assert_answers(endpoint, "smollm2-135m-instruct")


@pytest.mark.parametrize("layout", SMOLLM2_LAYOUTS)
def test_smollm2_gives_the_golden_tokens(smollm2: str, layout: str, tmp_path: Path) -> None:
    (tmp_path / TOPOLOGY).write_text(HEAD_APART)
    arguments = [str(tmp_path / TOPOLOGY) if each == TOPOLOGY else each for each in SMOLLM2_LAYOUTS[layout]]
    assert_golden(smollm2, "smollm2-135m-instruct", arguments, FEW_TOKENS)


@pytest.mark.parametrize("layout", GEMMA3_LAYOUTS)
def test_gemma3_gives_the_golden_tokens(gemma3: str, layout: str) -> None:
    assert_golden(gemma3, "gemma-3-270m", GEMMA3_LAYOUTS[layout], max_tokens=32)
