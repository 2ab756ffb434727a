"""Small models in every stored format on a GPU: the tokens of the same numbers in float32 on the CPU, as graphs."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from harness.answers.greedy_checks import Reference, assert_equal, assert_near, on_the_cpu
from harness.answers.greedy_runner import alone, make_runner, run_greedily
from harness.models.stored_models import IDS, NOT_CAPTURABLE, STORED, Stored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda:0")
Make = Callable[[str], tuple[Stored, Reference]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Write a model and compute its answer on the CPU; each once."""

    @cache
    def make(name: str) -> tuple[Stored, Reference]:
        model = STORED[name](tmp_path_factory.mktemp("stored"))
        return model, on_the_cpu(model.plain, IDS, 6)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", STORED)
def test_a_packed_model_equals_its_numbers(stored: Make, name: str, dtype: torch.dtype) -> None:
    model, reference = stored(name)
    place, links = alone()
    facts = model.packed.facts
    runner = make_runner(model.packed, place, range(facts.num_layers), 1, links, dtype, DEVICE)
    rows = run_greedily(runner, IDS, len(reference.output_ids), facts.vocab_size)
    runner.close()
    assert rows is not None
    if dtype == torch.float32:
        assert_equal(rows, reference)
    else:
        assert_near(rows, model.plain, IDS, 0.3 if "experts" in name else 0.1)
    assert rows.has_graphs == (name not in NOT_CAPTURABLE)
