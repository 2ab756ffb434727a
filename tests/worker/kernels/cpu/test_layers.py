"""The CPU's kernels for norms, gates, rotation and attention, against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.cpu import layers
from mgpu.worker.kernels.cpu.layers import Seen, add_norm, attend, gate, has_kernels, rotate, takes_heads, takes_rows

pytestmark = pytest.mark.skipif(not has_kernels(), reason="needs a C compiler")
BF16 = torch.bfloat16


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_norm_of_a_sum_also_updates_the_residual(rows: int) -> None:
    x, delta, weight = drawn(rows, 96), drawn(rows, 96, seed=2), drawn(96, seed=3)
    total = x + delta
    assert_near(add_norm(x, delta, weight, 1e-3), F.rms_norm(total.float(), (96,), weight.float(), 1e-3))
    assert torch.equal(x, total)
    assert_near(add_norm(x, None, weight, 1e-3), F.rms_norm(total.float(), (96,), weight.float(), 1e-3))
    assert torch.equal(x, total)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("is_gelu", [False, True])
def test_gates(is_gelu: bool, scale: float) -> None:
    x = (drawn(5, 192).float() * scale).to(BF16)
    gates, up = x.float().chunk(2, dim=1)
    expected = (F.gelu(gates, approximate="tanh") if is_gelu else F.silu(gates)) * up
    torch.testing.assert_close(gate(x, is_gelu).float(), expected, rtol=2**-7, atol=1e-2)


def test_rotation_of_heads_that_lie_in_wider_rows() -> None:
    heads, cos, sin = drawn(3, 7, 64)[:, 1:5], drawn(3, 1, 64, seed=2), drawn(3, 1, 64, seed=3)
    assert takes_heads(heads, cos, sin)
    assert_near(rotate(heads, cos, sin), heads.float() * cos.float() + heads.float().roll(32, -1) * sin.float())


@pytest.mark.parametrize(("num_q", "num_kv", "size"), [(9, 3, 64), (2, 2, 32), (14, 2, 128), (6, 1, 256)])
def test_attention_of_rows_with_contexts_of_all_lengths(num_q: int, num_kv: int, size: int) -> None:
    counts = [1, 64, 65, 200]
    k, v = drawn(400, num_kv, size), drawn(400, num_kv, size, seed=2)
    k[250:], v[250:] = torch.nan, torch.nan  # what no row sees must not matter
    slots = torch.stack([torch.randperm(250, generator=torch.Generator().manual_seed(row))[:200] for row in range(4)])
    q = drawn(4, num_q + 3, size, seed=3)[:, :num_q]
    found = attend(q, k, v, Seen(slots, torch.tensor(counts)), 0.3)
    for row, count in enumerate(counts):
        keys, values = (x[slots[row, :count]].transpose(0, 1).repeat_interleave(num_q // num_kv, 0) for x in (k, v))
        expected = F.scaled_dot_product_attention(q[row, :, None].float(), keys.float(), values.float(), scale=0.3)
        assert_near(found[row], expected[:, 0])


def test_large_scores_do_not_overflow_and_nan_stays_nan() -> None:
    k, v, q = drawn(70, 1, 32), drawn(70, 1, 32, seed=2), drawn(2, 1, 32, seed=3) * 1000
    q[1, 0, 5] = torch.nan
    found = attend(q, k, v, Seen(torch.arange(70).expand(2, 70).contiguous(), torch.tensor([70, 70])), 10.0)
    assert_near(found[0, 0], v[int((k[:, 0].float() @ q[0, 0].float()).argmax()), 0])
    assert found[1].isnan().all()


def test_other_types_sizes_and_strides_are_left_to_torch() -> None:
    assert not takes_rows(drawn(2, 96).float())
    assert not takes_rows(drawn(2, 40))
    assert not takes_rows(drawn(96, 2).T)
    assert not takes_heads(drawn(2, 3, 48))
    assert not takes_heads(drawn(2, 3, 1024))
    assert not takes_heads(drawn(2, 64, 3).transpose(1, 2))
    assert not takes_heads(drawn(2, 3, 64), drawn(1, 1, 64))


def test_a_kernel_that_computes_wrongly_turns_all_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(layers, "gate", lambda x, is_gelu: x[:, : x.shape[1] // 2] * torch.nan)
    has_kernels.cache_clear()
    assert not has_kernels()
    assert "gates" in caplog.text
    has_kernels.cache_clear()
