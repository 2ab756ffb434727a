"""Two GPUs give families and stored formats the tokens of one: split in tensors, in experts and in layers."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from harness.answers.greedy_checks import Reference, assert_equal, on_the_cpu
from harness.models.families import EVERY, SHARED_CACHES, has_experts, has_graphs
from harness.models.stored_models import IDS, NOT_CAPTURABLE, STORED, Stored
from harness.models.tiny_models import TinyModel
from harness.ranks.rank_pool import Job, RankPool
from mgpu.protocol.checkpoint.huggingface.borrowed import UNSPLIT
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.expert_facts import ExpertSplit

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
MakeModel = Callable[[str], TinyModel]
Make = Callable[[str], tuple[Stored, Reference]]
LAYOUTS: dict[str, tuple[list[int], ExpertSplit]] = {
    "tensors": ([2], "tensor"), "whole experts": ([2], "parallel"), "layers": ([1, 1], "tensor"),
}  # fmt: skip
"""By what the GPUs share: the ranks of each stage, and how ranks share experts."""


def layouts_of(family: str) -> Iterator[str]:
    if family not in UNSPLIT:
        yield "tensors"
    if family not in SHARED_CACHES:
        yield "layers"
    if has_experts(family) and family not in UNSPLIT:
        yield "whole experts"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    ranks = RankPool(["cuda:0", "cuda:1"])
    yield ranks
    ranks.end()


@pytest.mark.parametrize(("family", "layout"), [(family, each) for family in EVERY for each in layouts_of(family)])
def test_a_family_equals_transformers(tiny_model: MakeModel, pool: RankPool, family: str, layout: str) -> None:
    model, (sizes, split) = tiny_model(family), LAYOUTS[layout]
    job = Job(str(model.folder), sizes, model.prompt_ids, len(model.output_ids), split=split)
    rows, notes = pool.run(job)
    logits = model.logits[len(model.prompt_ids) - 1 : -1]
    assert_equal(rows, Reference(model.prompt_ids, model.output_ids, logits))
    assert not any("do not go by own kernels" in note for note in notes), notes
    norms_over_ranks = layout != "layers" and read_checkpoint(model.folder).facts.norms_whole_heads
    assert rows.has_graphs == (has_graphs(family) and not norms_over_ranks)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Write a model and compute its answer on the CPU; each once."""

    @cache
    def make(name: str) -> tuple[Stored, Reference]:
        model = STORED[name](tmp_path_factory.mktemp("stored"))
        return model, on_the_cpu(model.plain, IDS, 6)

    return make


def stored_layouts() -> Iterator[tuple[str, str]]:
    for name in STORED:
        yield from ((name, layout) for layout in LAYOUTS if layout != "whole experts" or "experts" in name)


@pytest.mark.parametrize(("name", "layout"), list(stored_layouts()))
def test_a_packed_model_equals_its_numbers(stored: Make, pool: RankPool, name: str, layout: str) -> None:
    (model, reference), (sizes, split) = stored(name), LAYOUTS[layout]
    job = Job(model.packed.source.path, sizes, IDS, len(reference.output_ids), split=split)
    rows, _ = pool.run(job)
    assert_equal(rows, reference)
    assert rows.has_graphs == (name not in NOT_CAPTURABLE)
