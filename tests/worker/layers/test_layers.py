"""What layers promise beside what whole models show."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.models.model_files import LLAMA_CONFIG, write_config
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.model.placement import even_range, head_shard, padded_vocab
from mgpu.worker.layers.attention.self_attention import Attention
from mgpu.worker.layers.linear import Linear, Storage, qkv_slices
from mgpu.worker.layers.norm import RMSNorm, _FewOperations, _Mirrored
from mgpu.worker.layers.products import choose as product
from mgpu.worker.layers.products import cpu_matmul
from mgpu.worker.layers.vocab import VocabParallel
from mgpu.worker.ranks.collectives import SingleRank

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (7, 5), (33, 130)])
def test_packed_and_plain_weights_give_the_product(inputs: int, outputs: int, rows: int) -> None:
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    for held in (weight, cpu_matmul.pack(weight)):
        torch.testing.assert_close(cpu_matmul.matmul(x, held), F.linear(x, weight), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cpu_matmul.matmul(x, held, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


def test_products_of_any_number_of_rows_need_few_kernels() -> None:
    asked = {rows: cpu_matmul.padded_rows(rows) for rows in range(1, 4097)}
    assert all(rows <= padded <= max(3, 1.5 * rows) for rows, padded in asked.items())
    assert len({padded for padded in asked.values() if padded <= 2048}) <= 40


def test_few_rows_are_padded_to_what_streams_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, multiplied = torch.ones(4, 4), []
    monkeypatch.setattr(cpu_matmul, "_onednn", lambda x, weight, bias: multiplied.append(len(x)) or x)
    asked = (1, 2, 3, 16, 17, 70)
    assert [len(cpu_matmul.matmul_repacked(torch.ones(rows, 4), weight)) for rows in asked] == list(asked)
    assert multiplied == [3, 3, 3, 16, 24, 96]


def test_strided_inputs_give_the_product() -> None:
    x, weight = torch.randn(5, 80)[:, 10:74], torch.randn(96, 64)
    torch.testing.assert_close(cpu_matmul.matmul(x, cpu_matmul.pack(weight)), F.linear(x, weight), atol=1e-4, rtol=1e-4)


@pytest.fixture
def _fresh_check() -> object:
    cpu_matmul._onednn_usable.cache_clear()
    yield
    cpu_matmul._onednn_usable.cache_clear()


@pytest.mark.usefixtures("_fresh_check")
@pytest.mark.parametrize("fault", ["absent", "wrong numbers"])
def test_a_faulty_private_operator_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    class Faulty:
        @staticmethod
        def _reorder_linear_weight(weight: Tensor, rows: int) -> Tensor:
            return weight

        @staticmethod
        def _linear_pointwise(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
            if fault == "absent":
                raise AttributeError("no such operator")
            return x.new_ones(len(x), len(weight))

    monkeypatch.setattr(torch.ops, "mkldnn", Faulty)
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    assert cpu_matmul.pack(weight) is weight
    assert torch.equal(cpu_matmul.matmul(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_even_ranges_cover_everything_once_and_differ_by_one(size: int) -> None:
    ranges = [even_range(32, rank, size) for rank in range(size)]
    assert [item for part in ranges for item in part] == list(range(32))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_ranks_beyond_the_kv_heads_read_the_same_kv_rows() -> None:
    slices = [qkv_slices(head_shard(8, 2, rank, 4), 16) for rank in range(4)]
    assert [part[0].rows for part in slices] == [range(32 * rank, 32 * rank + 32) for rank in range(4)]
    assert [part[1].rows for part in slices] == [range(16), range(16), range(16, 32), range(16, 32)]
    assert all(part[1].rows == part[2].rows for part in slices)


@pytest.mark.parametrize(("vocab_size", "ranks"), [(10, 4), (5, 4), (8, 2)])
def test_vocabulary_shards_embed_and_score_like_the_whole_matrix(vocab_size: int, ranks: int) -> None:
    matrix = torch.randn(vocab_size, 6)
    ids, x = torch.arange(vocab_size), torch.randn(3, 6)

    def work(group: ThreadGroup) -> tuple[Tensor, Tensor]:
        part = VocabParallel(vocab_size, 6, group, torch.float32, CPU)
        part.weight.fill_(torch.nan)  # padding rows must not matter
        part.weight[: part.num_valid] = matrix[part.start : part.start + part.num_valid]
        return part.embed(ids), group.all_gather(part.logits(x))

    for embedded, logits in run_ranks(ranks, work):
        assert torch.equal(embedded, matrix)
        assert logits.shape == (3, padded_vocab(vocab_size, ranks))
        torch.testing.assert_close(logits[:, :vocab_size], x @ matrix.T)
        assert (logits[:, vocab_size:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm_equals_its_formula(unit_offset: bool, dtype: torch.dtype) -> None:
    norm = RMSNorm(24, 1e-3, dtype, CPU, unit_offset)
    norm.weight.normal_()
    x = (torch.randn(2, 3, 24) * 0.05).to(dtype)
    x[0, 0] = 0.0
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(norm(x).double(), expected, atol=tolerance, rtol=tolerance)


def test_add_and_norm_updates_the_residual_in_place() -> None:
    norm = RMSNorm(8, 1e-6, torch.float32, CPU)
    residual, delta = torch.randn(3, 8), torch.randn(3, 8)
    expected = residual + delta
    normed = norm.add_and_norm(residual, delta)
    assert torch.equal(residual, expected)
    torch.testing.assert_close(normed, F.rms_norm(expected, (8,), eps=1e-6))


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_attention_hands_its_head_norms_to_kernels_if_it_has_them(family: str, tmp_path: Path) -> None:
    write_config(tmp_path, {**LLAMA_CONFIG, "architectures": [family]})
    attention = Attention(read_config_facts(tmp_path), SingleRank(), None, Storage(torch.float32, CPU))
    norms = attention.spec.norms
    if family == "LlamaForCausalLM":
        assert norms is None
        return
    assert norms is not None
    assert attention.q_norm is not None
    assert attention.k_norm is not None
    assert (norms.q_weight, norms.k_weight, norms.eps) == (
        attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps
    )  # fmt: skip


def test_weights_that_are_drawn_differ_and_keep_the_scale_of_their_input() -> None:
    linear = Linear(256, 128, True, Storage(torch.float32, CPU))
    linear.init_dummy(torch.Generator().manual_seed(1))
    assert len(linear.weight.unique()) > 30_000
    assert abs(float(linear.weight.std()) * 16 - 1) < 0.02
    assert linear.bias is not None
    assert not linear.bias.any()
    x = torch.randn(200, 256)
    assert 0.9 < float(linear(x).std()) < 1.1


@pytest.mark.skipif(not cpu_matmul._onednn_usable(torch.float32), reason="this torch lacks oneDNN's own entries")
def test_a_weight_on_the_cpu_is_packed_and_others_are_not() -> None:
    weight = torch.randn(96, 64)
    packed = cpu_matmul.pack(weight)
    assert packed.is_mkldnn
    assert not weight.is_mkldnn
    linear = Linear(64, 96, False, Storage(torch.float32, CPU))
    linear.weight.copy_(weight)
    linear.finalize()
    assert linear.weight.is_mkldnn
    x = torch.randn(3, 64)
    torch.testing.assert_close(linear(x), F.linear(x, weight), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "arithmetic"), [(torch.float32, _FewOperations), (torch.bfloat16, _Mirrored)])
def test_a_norm_takes_few_operations_on_the_cpu(dtype: torch.dtype, arithmetic: type) -> None:
    norm = RMSNorm(8, 1e-6, dtype, CPU)
    assert isinstance(norm._arithmetic, arithmetic)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 576), (3, 576), (5, 4, 64)])
def test_a_norm_of_two_bytes_is_that_of_float32_but_for_rounding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = RMSNorm(shape[-1], 1e-2, dtype, CPU)
    norm.weight.normal_(1.0, 0.3)
    sizes = torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x = (torch.randn(shape) * sizes).to(dtype)
    expected = F.rms_norm(x.float(), shape[-1:], norm.weight.float(), 1e-2)
    found = norm(x)
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float8_products_need_kernels_and_bfloat16(
    monkeypatch: pytest.MonkeyPatch, has_kernels: bool, dtype: torch.dtype
) -> None:
    float8_product = pytest.importorskip("mgpu.worker.kernels.products.float8_product")
    monkeypatch.setattr(product, "uses_kernels", lambda device: has_kernels)
    monkeypatch.setattr(float8_product, "multiplies_float8", lambda device: True)
    assert product.multiplies_float8(CPU, dtype) == (has_kernels and dtype == torch.bfloat16)
