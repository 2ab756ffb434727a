"""A whole model on the CPU in bfloat16 with packed weights gives the logits of the same weights in float32."""

import pytest
import torch
from torch import Tensor

from harness.models.random_model import write_random_model
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.layers import linear
from mgpu.worker.layers.products.cpu_packed import CpuWeight, has_kernel, multiply

IDS = [5, 90, 17, 3, 44, 61, 8, 29, 70, 11]
pytestmark = pytest.mark.skipif(
    not (has_kernel("int4") and has_kernel("int8")), reason="needs torch's products of 4 and 8 bits for the CPU"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(write_random_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every packed product."""
    rows: list[int] = []

    def counted(x: Tensor, weight: CpuWeight, bias: Tensor | None) -> Tensor:
        rows.append(len(x))
        return multiply(x, weight, bias)

    monkeypatch.setattr(linear, "multiply", counted)
    return rows


@torch.inference_mode()
@pytest.mark.parametrize("quant", ["8", "4"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_of_packed_weights(
    checkpoint: Checkpoint, quant: Quant, ranks: int, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [7, 1, 1, 1]
    exact = logits_in_chunks(checkpoint, IDS, chunks, ranks, quant=quant)
    assert not products, "float32 has no packed products"
    found = logits_in_chunks(checkpoint, IDS, chunks, ranks, dtype=torch.bfloat16, quant=quant)
    assert {7, 1} == set(products)
    # Activations in bfloat16 cost what they cost; that they are the same weights is what counts.
    monkeypatch.setattr(linear, "held_weight", lambda weight, form, dtype: weight)
    plain = logits_in_chunks(checkpoint, IDS, chunks, ranks, dtype=torch.bfloat16, quant=quant)
    errors = [float((each - exact).abs().mean() / exact.std()) for each in (found, plain)]
    assert errors[0] < 1.25 * errors[1] < 0.1
