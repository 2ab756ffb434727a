import pytest
import torch

from harness.kernels.kernel_checks import relative_error, tolerance
from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels import reference
from mgpu.worker.kernels.attention.inputs import PackedHeads
from mgpu.worker.kernels.attention.rope_cache import rope_and_cache
from mgpu.worker.kernels.layers.activation import gated_activation
from mgpu.worker.kernels.layers.head_values import with_normalized_values
from mgpu.worker.kernels.layers.norm import add_normed, add_rms_norm, rms_norm
from mgpu.worker.layers.attention import heads as plain_heads

FLOAT8_ERROR = 0.04
"""Three bits of mantissa."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim"), [(5, 96), (1, 576), (3, 64)])
def test_norms_equal_reference(device: torch.device, dtype: torch.dtype, tokens: int, dim: int) -> None:
    x, residual = (torch.randn(tokens, dim, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(dim, device=device).to(dtype)
    assert relative_error(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) < tolerance(dtype)

    stream = residual.clone()
    normed = add_rms_norm(stream, x, weight, 1e-6)
    assert relative_error(stream, residual.float() + x.float()) < tolerance(dtype)
    assert relative_error(normed, reference.rms_norm(stream, weight, 1e-6)) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_normalized_sum_is_added_multiplied_and_normalized(
    device: torch.device, dtype: torch.dtype, is_whole: bool
) -> None:
    y, residual = (torch.randn(3, 96, device=device).to(dtype) for _ in range(2))
    before, weight = (torch.randn(96, device=device).to(dtype) for _ in range(2))
    scale, factor = torch.rand(3, device=device) + 0.5, torch.tensor([0.75], device=device).to(dtype)
    stream = residual.clone()
    more = {"y_scale_T": scale, "factor_1": factor} if is_whole else {}
    normed = add_normed(stream, y, before, 1e-2, **more, weight_D=weight if is_whole else None, eps=1e-3)
    scaled = y.float() * scale[:, None] if is_whole else y
    expected = residual.float() + reference.rms_norm(scaled, before, 1e-2)
    assert relative_error(stream, expected * 0.75 if is_whole else expected) < tolerance(dtype)
    assert (normed is None) != is_whole
    if normed is not None:
        assert relative_error(normed, reference.rms_norm(stream, weight, 1e-3)) < tolerance(dtype)


@pytest.mark.parametrize("stored", [6, 8])
def test_values_are_normalized_and_may_be_keys(device: torch.device, stored: int) -> None:
    packed = torch.randn(3, stored + 1, 24, device=device)[:, :stored]
    expected = plain_heads.with_normalized_values(packed, 4, 2, 1e-2)
    assert expected.shape[1] == 8
    assert relative_error(with_normalized_values(packed, 4, 2, 1e-2), expected) < tolerance(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [48, 2500])
def test_gated_activation_equals_reference(
    device: torch.device, dtype: torch.dtype, activation: Activation, width: int
) -> None:
    x = torch.randn(3, 2 * width, device=device).to(dtype)
    expected = reference.gated_activation(x, activation == "silu")
    assert relative_error(gated_activation(x, activation), expected) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim", "block_size"), [(5, 1, 64, 16), (8, 4, 32, 32), (4, 4, 128, 16)]
)
def test_rope_rotates_and_fills_the_cache(
    device: torch.device, dtype: torch.dtype, with_norms: bool, q_heads: int, kv_heads: int, dim: int, block_size: int
) -> None:
    tokens, blocks = 5, 3
    qkv = torch.randn(tokens, q_heads + 2 * kv_heads, dim, device=device).to(dtype)
    cos_sin = torch.randn(40, dim, device=device)
    positions = torch.randint(0, 40, (tokens,), device=device)
    slots = torch.randperm(blocks * block_size, device=device)[:tokens]
    slots[2] = -1
    k, v = (torch.full((blocks, block_size, kv_heads, dim), 7.0, device=device).to(dtype) for _ in range(2))
    weights = [torch.randn(dim, device=device) for _ in range(2)]
    heads = PackedHeads(qkv, cos_sin, None, *((*weights, 1e-6) if with_norms else ()))
    q = rope_and_cache(heads, positions, slots, k, v)

    plain = [qkv[:, :q_heads].float(), qkv[:, q_heads : q_heads + kv_heads].float()]
    if with_norms:
        plain = [reference.rms_norm(x.flatten(0, 1), w, 1e-6).view_as(x) for x, w in zip(plain, weights, strict=True)]
    expected_q, expected_k = (reference.rotate(x, cos_sin[positions]) for x in plain)
    stored = [i for i in range(tokens) if i != 2]
    assert relative_error(q, expected_q) < tolerance(dtype)
    assert relative_error(k.flatten(0, 1)[slots[stored]], expected_k[stored]) < tolerance(dtype)
    assert torch.equal(v.flatten(0, 1)[slots[stored]], qkv[stored, q_heads + kv_heads :])
    for cache in (k, v):  # nothing else was written
        assert int((cache == 7.0).all(-1).sum()) == (blocks * block_size - len(stored)) * kv_heads


def test_a_float8_cache_gets_scaled_saturated_values(device: torch.device) -> None:
    qkv = torch.randn(1, 3, 64, device=device)
    qkv[0, 2, 0] = 1e6
    k, v = (torch.zeros(1, 16, 1, 64, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    place = torch.zeros(1, dtype=torch.int64, device=device)
    cos_sin = torch.cat([torch.ones(1, 32, device=device), torch.zeros(1, 32, device=device)], dim=1)
    rope_and_cache(PackedHeads(qkv, cos_sin), place, place, k, v, k_scale=0.1, v_scale=0.2)
    assert relative_error(k[0, 0, 0].float() * 0.1, qkv[0, 1]) < FLOAT8_ERROR
    assert float(v[0, 0, 0, 0]) == 448.0
    assert relative_error(v[0, 0, 0, 1:].float() * 0.2, qkv[0, 2, 1:]) < FLOAT8_ERROR
