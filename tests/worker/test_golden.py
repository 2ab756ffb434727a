"""Real weights give the recorded greedy tokens, computed stage by stage without the engine."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rank_threads import ThreadGroup, run_ranks
from stage_driver import Row, Stages, make_batch

from mgpu.protocol.checkpoint import read_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"


def cached_model(golden: dict[str, object]) -> Path:
    """Find the weights in the cache, else skip and say how to get them."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgpu"
    path = Path(os.environ.get("MGPU_CACHE") or default) / "models" / str(golden["gguf"])
    if not path.exists():
        pytest.skip(f"{path} is missing; {golden['obtain']}")
    return path


@pytest.mark.parametrize(
    ("name", "tp_size", "bounds"),
    [
        ("smollm2-135m-instruct", 1, (0, 30)),
        ("smollm2-135m-instruct", 3, (0, 30)),
        ("smollm2-135m-instruct", 1, (0, 7, 30)),
        ("gemma-3-270m", 1, (0, 18)),
        ("gemma-3-270m", 4, (0, 18)),
    ],
)
def test_greedy_tokens_and_logprobs_equal_the_golden_file(name: str, tp_size: int, bounds: tuple[int, ...]) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    checkpoint = read_checkpoint(cached_model(golden))
    splits = [range(first, end) for first, end in pairwise(bounds)]

    def work(group: ThreadGroup) -> list[tuple[list[int], list[float]]]:
        stages = Stages(checkpoint, group, splits, num_blocks=64)
        prompts: list[list[int]] = [prompt["prompt_ids"] for prompt in golden["prompts"]]
        rows = [Row(list(range(20 * index, 20 * index + 20))) for index in range(len(prompts))]
        outputs: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        new = prompts
        for _ in range(32):
            logits = stages.step(make_batch(list(zip(rows, new, strict=True)), stages.block_size))
            chosen = logits.log_softmax(-1).max(-1)
            for (ids, logprobs), token, logprob in zip(outputs, chosen.indices, chosen.values, strict=True):
                ids.append(int(token))
                logprobs.append(float(logprob))
            new = [[ids[-1]] for ids, _ in outputs]
        return outputs

    for (ids, logprobs), prompt in zip(run_ranks(tp_size, work)[0], golden["prompts"], strict=True):
        assert ids == prompt["output_ids"]
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(prompt["output_logprobs"]), atol=1e-3, rtol=0)
