"""Streams that share prefixes, are preempted and cross blocks get the tokens that each gets alone."""

import random
from collections.abc import Callable

import pytest
import torch

from harness.models.scheduled_model import Request, ScheduledModel
from harness.models.tiny_models import TinyModel
from mgpu.orchestrator.scheduler import block_tables
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.protocol.checkpoint.read import read_checkpoint

MakeModel = Callable[[str], TinyModel]
WINDOWED = ("mistral-window", "gemma3", "gemma4-small", "gpt-oss", "llama4")
"""All layers, some, some that read another's cache, some with sinks, and chunks."""


def limits_of(**changes: object) -> Limits:
    values = {"block_size": 4, "max_rows": 8, "max_batch_tokens": 24, "max_seq_len": 63, "num_blocks": 48, **changes}
    return Limits(**values)  # type: ignore[arg-type]


def mixed_requests(count: int, longest: int, seed: int = 0) -> list[Request]:
    """Return requests of which many begin alike, and some are alike. The first ones grow, so that blocks run out."""
    rng = random.Random(seed)
    systems = [[rng.randrange(3, 90) for _ in range(longest // 2)] for _ in range(3)]
    found = [Request([3 + index], longest // 2) for index in range(count // 2)]
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


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_that_give_up_blocks_change_no_token(
    tiny_model: MakeModel, family: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, size = tiny_model(family), 4 if device.type == "cpu" else 16
    monkeypatch.setattr(block_tables, "ENTRY_TOKENS", size)  # many begin, and must be preempted
    model, requests = ScheduledModel(read_checkpoint(tiny.folder), device=device), mixed_requests(16, 10 * size)
    requests[3] = Request(tiny.prompt_ids, len(tiny.output_ids))
    sizes = {"block_size": size, "max_seq_len": 16 * size - 1, "max_batch_tokens": 6 * size}
    answers, scheduler = model.run(limits_of(**sizes, num_pages=13, sight=model.facts.sight), requests)
    assert scheduler.counters.preemptions > 0
    assert scheduler.counters.prefix_hit_tokens > 0
    assert answers[3] == tiny.output_ids, "transformers' tokens"
    assert answers == model.run(limits_of(**sizes, max_rows=1, prefix_cache=False), requests)[0], "one by one"
