"""Streams that share prefixes, are preempted and cross blocks get the tokens that each gets alone."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from harness.models.scheduled_model import Request, ScheduledModel
from harness.models.tiny_models import TinyModel
from mgpu.orchestrator.scheduler import block_tables
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.protocol.checkpoint.read import read_checkpoint

MakeModel = Callable[[str], TinyModel]
FAMILIES = (
    "mistral-window", "gemma3", "gemma4-small", "gemma4-moe", "gpt-oss", "llama4", "qwen3-next", "qwen3.5-moe",
    "deepseek-v3", "mistral4", "glm4-moe", "minimax-m2",
)  # fmt: skip
"""With windows in all layers or some, caches that are read by others, sinks, chunks, states, latents, experts."""


def limits_of(**changes: object) -> Limits:
    values = {"block_size": 4, "max_rows": 8, "max_batch_tokens": 24, "max_seq_len": 63, "num_blocks": 48, **changes}
    return Limits(**values)  # type: ignore[arg-type]


def mixed_requests(count: int, longest: int, seed: int = 0) -> list[Request]:
    """Return requests of which many begin alike, and some are alike. The first ones grow, so that blocks run out."""
    rng = random.Random(seed)
    systems = [[rng.randrange(3, 90) for _ in range(longest // 2)] for _ in range(3)]
    found = [Request([3 + index], longest // 2) for index in range(8)]
    for _ in range(count - len(found)):
        shared = rng.choice(systems)[: rng.choice([0, longest // 4, longest // 2])]
        own = [rng.randrange(3, 90) for _ in range(rng.randrange(1, longest // 3))]
        found.append(rng.choice(found) if rng.randrange(5) == 0 else Request(shared + own, rng.randrange(1, 12)))
    return found


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_in_a_crowd_get_the_tokens_that_each_gets_alone(
    tiny_model: MakeModel, family: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, size = tiny_model(family), 4 if device.type == "cpu" else 16
    monkeypatch.setattr(block_tables, "ENTRY_TOKENS", size)  # many begin, and must be preempted
    model, requests = ScheduledModel(read_checkpoint(tiny.folder), device=device), mixed_requests(64, 10 * size)
    requests[3] = Request(tiny.prompt_ids, len(tiny.output_ids))
    sight = model.facts.sight
    limits = limits_of(
        block_size=size, max_seq_len=16 * size - 1, max_batch_tokens=6 * size, sight=sight,
        num_blocks=48 if sight[0] else 24, num_pages=16 if sight[0] else 0, num_snapshots=8 * bool(model.facts.linear),
    )  # fmt: skip
    answers, scheduler = model.run(limits, requests, loses_after=40)
    counters = scheduler.counters
    assert min(counters.preemptions, counters.prefix_hit_tokens, counters.replays) > 0
    assert answers[3] == tiny.output_ids, "transformers' tokens"
    some = range(0, 64, 8)
    alone = replace(limits, max_rows=1, num_blocks=48, num_pages=0, num_snapshots=0, prefix_cache=False)
    assert [answers[at] for at in some] == model.run(alone, [requests[at] for at in some])[0]
