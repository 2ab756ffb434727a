"""Tiny models of every family on a GPU: in float32 the tokens of transformers, in bfloat16 near them, as graphs."""

from collections.abc import Callable, Iterator

import pytest
import torch

from harness.answers.greedy_checks import Reference, assert_equal, assert_near
from harness.answers.greedy_runner import Rows, alone, make_runner, run_greedily
from harness.models.families import BORROWED, EVERY, SHARED_CACHES, has_experts, has_graphs
from harness.models.tiny_models import TinyModel
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.huggingface.borrowed import UNSPLIT
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.worker.kernels.use import uses_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda:0")
MakeModel = Callable[[str], TinyModel]
SPLIT = [
    (family, dtype)
    for family in EVERY
    for dtype in (torch.float32, torch.bfloat16)
    if family not in UNSPLIT and family not in SHARED_CACHES and not (family in BORROWED and dtype == torch.bfloat16)
]
"""Transformers' models are made in a type that is set for a whole process, so not by ranks that are threads of one."""


def noise_of(family: str) -> float:
    """Return how far logits in bfloat16 may be from those in float32, of how far they spread.

    Rounding turns some routers to another expert. In Gemma 4, logits of transformers in bfloat16 are as far away.
    """
    return 0.3 if has_experts(family) else 0.2 if family.startswith("gemma4") else 0.1


def run(checkpoint: Checkpoint, model: TinyModel, dtype: torch.dtype) -> Rows:
    place, links = alone()
    layers = range(checkpoint.facts.num_layers)
    runner = make_runner(checkpoint, place, layers, 1, links, dtype, DEVICE)
    rows = run_greedily(runner, model.prompt_ids, len(model.output_ids), checkpoint.facts.vocab_size)
    runner.close()
    assert rows is not None
    return rows


def reference_of(model: TinyModel) -> Reference:
    return Reference(model.prompt_ids, model.output_ids, model.logits[len(model.prompt_ids) - 1 : -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", EVERY)
def test_a_family_equals_transformers(tiny_model: MakeModel, family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    checkpoint = read_checkpoint(model.folder)
    rows = run(checkpoint, model, dtype)
    if dtype == torch.float32:
        assert_equal(rows, reference_of(model))
    else:
        assert_near(rows, checkpoint, model.prompt_ids, noise_of(family))
    assert rows.has_graphs == has_graphs(family, dtype == torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "smollm3", "qwen3"])
def test_transformers_code_equals_transformers(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family)
    checkpoint = read_checkpoint(model.folder, code="transformers")
    assert checkpoint.facts.borrowed is not None
    rows = run(checkpoint, model, torch.float32)
    assert_equal(rows, reference_of(model))
    assert rows.has_graphs


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MGPU_KERNELS", "0")
    uses_kernels.cache_clear()
    yield
    uses_kernels.cache_clear()


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("family", ["gemma3", "gemma4-moe", "qwen3-moe", "qwen3.5", "deepseek-v3"])
def test_plain_torch_equals_transformers(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family)
    rows = run(read_checkpoint(model.folder), model, torch.float32)
    assert_equal(rows, reference_of(model))
    assert not rows.has_graphs


@pytest.mark.parametrize(("family", "dtype"), SPLIT, ids=str)
def test_two_stages_of_two_ranks_equal_transformers(tiny_model: MakeModel, family: str, dtype: torch.dtype) -> None:
    """The ranks are threads that share the GPU, and launch kernel by kernel."""
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    chunks = [9, len(model.prompt_ids) - 9] + [1] * len(model.output_ids)
    split = "parallel" if has_experts(family) and family in BORROWED else "tensor"
    logits = logits_in_chunks(
        read_checkpoint(model.folder), ids, chunks, 2, 2, dtype=dtype, device=DEVICE, expert_split=split
    )
    if dtype == torch.float32:
        torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)
    else:
        assert (logits - model.logits).abs().mean() < noise_of(family) * model.logits.std()
