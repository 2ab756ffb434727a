"""Float8 products (W8A8): rows are quantized as the reference does, and layers pass them on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.kernels.kernel_checks import relative_error
from harness.models.random_model import write_random_model
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.quantization import weight_format
from mgpu.worker.attention.triton_backend import TritonBackend
from mgpu.worker.kernels import reference
from mgpu.worker.kernels.attention.inputs import PackedHeads
from mgpu.worker.kernels.attention.rope_cache import rope_and_cache
from mgpu.worker.kernels.layers.activation import gated_activation, gated_activation_float8
from mgpu.worker.kernels.layers.float8_quantize import quantize_rows
from mgpu.worker.kernels.layers.norm import add_rms_norm, add_rms_norm_float8, rms_norm
from mgpu.worker.kernels.products import float8_product as products
from mgpu.worker.kernels.runtime import LAUNCH_MODE
from mgpu.worker.layers import linear, mlp, norm
from mgpu.worker.layers.activations import scaled
from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.mlp import GatedMLP
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.models import stage
from mgpu.worker.quantization import float8_rows
from mgpu.worker.quantization.float8_rows import BLOCK, Float8Rows, UnscaledProduct
from mgpu.worker.quantization.packing import WORDS, dequantize
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.ranks.collectives import SingleRank

BF16 = torch.bfloat16
ROUNDING = 0.032
"""Relative error of e4m3's three bits of mantissa, with some values that are subnormal."""
BF16_ROUNDING = 5e-3


def draw(*shape: int, device: torch.device, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def scales(tokens: int, device: torch.device) -> Tensor:
    return torch.logspace(-2, 3, tokens, device=device)


def values(rows: Float8Rows, k: int) -> Tensor:
    """Return the values of quantized rows, in the usual order of channels."""
    assert rows.values.shape[1] == -(-k // BLOCK) * BLOCK
    blocks = rows.values.float().view(len(rows.values), -1, WORDS, 4).transpose(2, 3)
    values = blocks.flatten(1) * rows.scale_T[:, None]
    assert (values[:, k:] == 0).all()
    return values[:, :k]


@pytest.mark.parametrize("k", [96, 128, 1100])
def test_rows_are_quantized_as_the_reference_does(device: torch.device, k: int) -> None:
    x = draw(5, k, device=device) * scales(5, device)[:, None]
    x[3] = 0
    got, expected = quantize_rows(x), float8_rows.quantize_rows(x)
    assert torch.equal(got.scale_T, expected.scale_T)
    assert torch.equal(got.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(values(got, k), float8_rows.round_rows(x))
    assert relative_error(values(got, k), x) < ROUNDING
    for row in (0, 3):
        alone = quantize_rows(x[row : row + 1])
        assert torch.equal(alone.values.view(torch.uint8)[0], got.values.view(torch.uint8)[row])


def test_a_float8_product_is_that_of_rounded_rows(device: torch.device) -> None:
    """Next to the weight-only product, what differs is the rounding of the activations."""
    assert products.trial_error(device) < BF16_ROUNDING
    weight = quantize(draw(48, 320, device=device, dtype=torch.float32), weight_format("fp8"))
    x = draw(17, 320, device=device)
    got = products.float8_product(quantize_rows(x), weight).scaled()
    assert 0 < relative_error(got, x.float() @ dequantize(weight, torch.float32).T) < ROUNDING


@pytest.mark.parametrize("with_scale", [False, True])
def test_a_quantizing_norm_is_norm_then_quantization(device: torch.device, with_scale: bool) -> None:
    delta, residual, weight = (draw(*shape, device=device) for shape in ((4, 200), (4, 200), (200,)))
    scale = scales(4, device) if with_scale else None
    streams = [residual.clone(), residual.clone()]
    got = add_rms_norm_float8(streams[0], delta, weight, 1e-6, scale)
    plain = add_rms_norm(streams[1], delta, weight, 1e-6, delta_scale_T=scale)
    assert torch.equal(streams[0], streams[1])
    assert relative_error(values(got, 200), plain) < ROUNDING


def test_what_reads_a_product_multiplies_by_its_scales(device: torch.device) -> None:
    x, residual, weight = (draw(*shape, device=device) for shape in ((4, 192), (4, 192), (192,)))
    scale = scales(4, device)
    scaled = x.float() * scale[:, None]
    assert relative_error(rms_norm(x, weight, 1e-6, scale), reference.rms_norm(scaled, weight, 1e-6)) < BF16_ROUNDING
    stream = residual.clone()
    add_rms_norm(stream, x, weight, 1e-6, delta_scale_T=scale)
    assert relative_error(stream, residual.float() + scaled) < BF16_ROUNDING
    expected = reference.gated_activation(scaled, True)
    assert relative_error(gated_activation(x, "silu", scale), expected) < BF16_ROUNDING
    assert relative_error(values(gated_activation_float8(x, "silu", scale), 96), expected) < ROUNDING
    assert relative_error(UnscaledProduct(x.clone(), scale).scaled(), scaled) < BF16_ROUNDING


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_rotation_multiplies_heads_by_their_tokens_scale(device: torch.device, normed: bool) -> None:
    ones = torch.ones(32, device=device)
    norms = (ones, ones, 1e-6) if normed else ()
    qkv, table = draw(3, 4, 32, device=device, dtype=torch.float32), torch.randn(16, 32, device=device)
    places, scale = torch.arange(3, device=device), scales(3, device)

    def run(heads: Tensor, scale_T: Tensor | None) -> list[Tensor]:
        k, v = (torch.zeros(1, 16, 1, 32, device=device) for _ in range(2))
        q = rope_and_cache(PackedHeads(heads, table, scale_T, *norms), places, places, k, v)
        return [q, k, v]

    for got, expected in zip(run(qkv, scale), run(qkv * scale[:, None, None], None), strict=True):
        torch.testing.assert_close(got, expected)


def use_float8_layers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers use the kernels and float8 products, also in the interpreter."""
    if device.type == "cpu":
        for module in (norm, mlp):
            monkeypatch.setattr(module, "uses_kernels", lambda device: True)
        monkeypatch.setattr(stage, "select_backend", lambda device, shape: TritonBackend())
        monkeypatch.setattr(linear, "multiplies_float8", lambda device, dtype: True)
    elif not products.multiplies_float8(device):
        pytest.skip("this GPU has no float8 products")


def count_calls(monkeypatch: pytest.MonkeyPatch, function: Callable[..., object]) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(
        f"{function.__module__}.{function.__name__}", lambda *args: (calls.append(1), function(*args))[1]
    )
    return calls


@pytest.mark.parametrize("bias", [False, True])
def test_layers_hand_quantized_rows_and_scales_on(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    use_float8_layers(device, monkeypatch)
    separate = count_calls(monkeypatch, quantize_rows)
    torch.manual_seed(0)
    layer = GatedMLP(64, 80, "silu", bias, SingleRank(), Storage(BF16, device, weight_format("fp8")))
    before, after = (RMSNorm(64, 1e-6, BF16, device) for _ in range(2))
    before.takes_float8 = layer.gate_up.takes_float8
    for part in (layer.gate_up, layer.down):
        part.init_dummy(torch.Generator(device).manual_seed(1))
    streams = [draw(9, 64, device=device)]
    delta = draw(9, 64, device=device)
    streams.append(streams[0].clone())
    # Rows that are too few for float8 give the weight-only products.
    few = [layer(before.add_and_norm(streams[0][i : i + 3], delta[i : i + 3])) for i in range(0, 9, 3)]
    expected = after.add_and_norm(streams[0], torch.cat([scaled(part) for part in few]))
    rows = before.add_and_norm(streams[1], delta)
    assert isinstance(rows, Float8Rows)
    product = layer(rows)
    assert isinstance(product, Tensor) == bias
    got = after.add_and_norm(streams[1], product)
    assert isinstance(got, Tensor)
    assert isinstance(expected, Tensor)
    assert relative_error(got, expected) < 2 * ROUNDING
    assert not separate


def test_a_whole_model_gives_almost_the_logits_of_weight_only_products(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    checkpoint, ids, chunks = read_checkpoint(write_random_model(tmp_path, **changes)), [*range(3, 13)], [9, 1]
    weight_only = logits_in_chunks(checkpoint, ids, chunks, dtype=BF16, quant="fp8")
    use_float8_layers(device, monkeypatch)
    separate = count_calls(monkeypatch, quantize_rows)
    got = logits_in_chunks(checkpoint, ids, chunks, dtype=BF16, device=device, quant="fp8")
    assert len(separate) == 1 + 2  # what the embedding gives, and the attention of each layer
    assert 0 < relative_error(got, weight_only) < 0.08


def test_the_error_of_a_trial_does_not_count_while_launches_only_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:7")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(products, "trial_error", lambda device: torch.inf)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", True)
    assert products.multiplies_float8(device)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", False)
    assert not products.multiplies_float8(device)
