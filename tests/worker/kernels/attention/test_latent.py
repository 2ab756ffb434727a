"""The kernels of latent attention equal plain torch, in the interpreter and compiled."""

from pathlib import Path

import pytest
import torch

from harness.kernels.kernel_checks import paged_cache, relative_error, tolerance
from harness.models.random_model import write_random_model
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import Row, Stages, make_batch
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.worker.attention import triton_backend
from mgpu.worker.kernels.attention import latent
from mgpu.worker.kernels.attention.inputs import LatentProjections, LatentRows, NewLatents
from mgpu.worker.kernels.attention.latent import choose_splits, heads_of_tile, latent_attention
from mgpu.worker.kernels.attention.latent_cache import store_latents
from mgpu.worker.kernels.attention.latent_heads import FEW_TOKENS, absorb, values
from mgpu.worker.kernels.attention.latent_prefill import LatentTiling, PromptRows, latent_prefill, plan_pieces
from mgpu.worker.kernels.reference import paged_attention, rms_norm, rotate

RANK, ROTATED = 32, 16


@pytest.mark.parametrize(
    ("heads", "splits", "dtype"), [(1, 4, torch.float32), (20, 1, torch.float32), (16, 4, torch.bfloat16)]
)
def test_rows_attend_to_their_contexts(device: torch.device, heads: int, splits: int, dtype: torch.dtype) -> None:
    contexts = [1, 140, 0, 129]
    paged = paged_cache(contexts, 16, 1, RANK + ROTATED, dtype, device)
    q = torch.randn(len(contexts), heads, RANK + ROTATED, device=device).to(dtype)
    out = torch.full((len(contexts), heads, RANK), torch.nan, device=device, dtype=dtype)
    rows = LatentRows(paged.tables, paged.lens)
    latent_attention(q[..., :RANK], q[..., RANK:], paged.k[:, :, 0], rows, scale=0.2, out_THC=out, splits=splits)
    expected = paged_attention(q, paged.k, paged.k, paged.tables, contexts, [*range(len(contexts) + 1)], 0.2)
    assert relative_error(out, expected[..., :RANK]) < tolerance(dtype)


def test_tokens_of_prompts_see_what_is_before_them(device: torch.device) -> None:
    contexts, starts = [40, 21], [1, 8, 29]  # the first token is another row's, and the last two are padding
    paged = paged_cache(contexts, 16, 1, RANK + ROTATED, torch.float32, device)
    q = torch.randn(31, 4, RANK + ROTATED, device=device)
    owners = torch.tensor([-1] + [0] * 7 + [1] * 21 + [-1] * 2, dtype=torch.int32, device=device)
    positions = torch.tensor([0, *range(33, 40), *range(21), 0, 0], device=device)
    out = torch.zeros(31, 4, RANK, device=device)
    rows = LatentRows(paged.tables, positions, owners)
    latent_attention(q[..., :RANK], q[..., RANK:], paged.k[:, :, 0], rows, scale=0.2, out_THC=out, splits=1)
    expected = paged_attention(q, paged.k, paged.k, paged.tables, contexts, starts, 0.2)
    assert relative_error(out, expected[..., :RANK]) < tolerance(torch.float32)


@pytest.mark.parametrize(
    ("plain", "value_dim", "most_tokens", "dtype"),
    [(24, 12, 1000, torch.float32), (16, 32, 90, torch.float32),
     pytest.param(16, 16, 90, torch.bfloat16, marks=pytest.mark.gpu)],
)  # fmt: skip
def test_prompts_attend_to_projected_keys_and_values_piece_by_piece(
    device: torch.device, plain: int, value_dim: int, most_tokens: int, dtype: torch.dtype
) -> None:
    """A chunk behind a context, a whole prompt and one token, behind a token of another row and before padding."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter is slow, and has no bfloat16 of its own")
    contexts, starts, heads = [70, 21, 1], [1, 38, 59, 60], 3
    paged = paged_cache(contexts, 16, 1, RANK + ROTATED, dtype, device)
    q = torch.randn(62, heads, plain, device=device).to(dtype)
    turned = torch.randn(62, heads, ROTATED, device=device).to(dtype)
    weight = (torch.randn(heads, plain + value_dim, RANK, device=device) * RANK**-0.5).to(dtype)
    out = torch.full((62, heads, value_dim), torch.nan, device=device, dtype=dtype)
    pieces = plan_pieces(paged.tables, contexts, 16, most_tokens)
    assert [piece.first for piece in pieces] == ([0] if most_tokens > 100 else [0, 30, 60])
    assert sum(len(piece.slots_S) for piece in pieces) == sum(contexts)
    rows = PromptRows(paged.lens, torch.tensor(starts, dtype=torch.int32, device=device), pieces)
    tiling = LatentTiling(16, 16, 4, 2)
    held = LatentProjections(q, weight)
    latent_prefill(held, turned, paged.k[:, :, 0], rows, scale=0.2, out_THV=out, tiling=tiling)
    wide = torch.cat([torch.einsum("thp,hpc->thc", q.float(), weight[:, :plain].float()), turned.float()], dim=2)
    attended = paged_attention(wide, paged.k, paged.k, paged.tables, contexts, starts, 0.2)[..., :RANK]
    expected = torch.einsum("thc,hvc->thv", attended, weight[:, plain:].float())
    new = slice(starts[0], starts[-1])
    assert relative_error(out[new], expected[new]) < 2 * tolerance(dtype)
    assert out[: starts[0]].isnan().all()
    assert out[starts[-1] :].isnan().all()


@pytest.mark.parametrize("tokens", [1, 3, FEW_TOKENS + 1])
def test_queries_and_sums_are_projected_head_by_head(device: torch.device, tokens: int) -> None:
    weight = torch.randn(5, 24 + 12, RANK, device=device)
    q = torch.randn(tokens, 5, 24 + ROTATED, device=device)[..., :24]
    attended = torch.randn(5, tokens, RANK, device=device).transpose(0, 1)
    wide, narrow = absorb(q, weight), values(attended, weight, 24)
    assert relative_error(wide, torch.einsum("thp,hpc->thc", q, weight[:, :24])) < tolerance(torch.float32)
    assert relative_error(narrow, torch.einsum("thc,hvc->thv", attended, weight[:, 24:])) < tolerance(torch.float32)


@pytest.mark.parametrize(("is_interleaved", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_new_latents_are_normalized_rotated_and_stored(
    device: torch.device, is_interleaved: bool, dtype: torch.dtype
) -> None:
    packed = torch.randn(5, 3 + RANK + ROTATED, device=device).to(dtype)
    heads = torch.randn(5, 20, 8 + ROTATED, device=device).to(dtype)
    weight = torch.rand(RANK, device=device).to(dtype)
    new = NewLatents(packed[:, 3:], heads[..., 8:], weight, 1e-6, is_interleaved)
    table = torch.rand(50, ROTATED, device=device) * 2 - 1
    positions = torch.tensor([3, 0, 49, 7, 1], device=device)
    slots = torch.tensor([5, 17, -1, 30, 2], device=device)
    cache = torch.full((3, 16, RANK + ROTATED), torch.nan, device=device, dtype=dtype)
    plain, matrices = (
        torch.randn(5, 20, 24, device=device).to(dtype),
        torch.randn(20, 30, RANK, device=device).to(dtype),
    )
    turned, wide = store_latents(new, table, positions, slots, cache, LatentProjections(plain, matrices))
    assert wide is None, "more than a few tokens have another kernel for that"
    one = NewLatents(*(each[:1] for each in new[:2]), *new[2:])
    where = table, positions[:1], slots[:1], torch.zeros_like(cache)
    _, wide = store_latents(one, *where, LatentProjections(plain[:1], matrices))
    assert wide is not None
    expected = torch.einsum("thp,hpc->thc", plain[:1].float(), matrices[:, :24].float())
    assert relative_error(wide, expected) < tolerance(dtype)

    def halves(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1) if is_interleaved else x

    key = rotate(halves(packed[:, None, 3 + RANK :]), table[positions])[:, 0]
    latents = torch.cat([rms_norm(packed[:, 3 : 3 + RANK], weight, 1e-6), key], dim=1)
    stored = cache.flatten(0, 1)
    is_kept = slots >= 0
    assert relative_error(stored[slots[is_kept]], latents[is_kept]) < tolerance(dtype)
    assert int(stored.isnan().all(1).sum()) == len(stored) - 4
    assert relative_error(turned, rotate(halves(heads[..., 8:]), table[positions])) < tolerance(dtype)


def test_tiles_have_as_many_heads_as_divide_and_few_tokens_are_split() -> None:
    assert [heads_of_tile(count) for count in (1, 8, 16, 20, 24, 128)] == [1, 8, 16, 10, 12, 16]
    assert [choose_splits(pairs) for pairs in (1, 8, 66, 67, 1000)] == [64, 16, 2, 1, 1]


@pytest.mark.parametrize("least_queries", [1, 100])
def test_a_model_computes_the_same_with_kernels_as_without(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_queries: int
) -> None:
    monkeypatch.setattr(latent, "choose_splits", lambda pairs: 2)
    monkeypatch.setattr(triton_backend, "LEAST_QUERIES", least_queries)
    monkeypatch.setattr(triton_backend, "EXPANDED_BYTES", 800)  # pieces of a few tokens
    folder = write_random_model(
        tmp_path, architectures=["DeepseekV3ForCausalLM"], hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        kv_lora_rank=RANK, qk_rope_head_dim=ROTATED, qk_nope_head_dim=8, v_head_dim=12, q_lora_rank=16,
        first_k_dense_replace=0, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip

    def work(group: ThreadGroup) -> list[torch.Tensor]:
        logits = []
        for has_kernels in (False, True):
            stages = Stages(read_checkpoint(folder), group, [range(1)], device=device)
            if has_kernels:
                stages.stages[0].assume_kernels()
            rows = [Row([9, 2, 11, 4, 30]), Row([1, 0, 3]), Row([7, 10, 12, 13])]
            ids = [*range(5, 25)]
            steps = (
                [(rows[0], ids[:6]), (rows[1], ids[:3])],
                [(rows[1], ids[3:4]), (rows[0], ids[6:7]), (rows[2], ids[:5])],
                [(rows[0], ids[7:8]), (rows[2], ids[5:9])],
                [(rows[2], ids[9:10]), (rows[0], ids[8:9])],
            )
            logits += [stages.step(make_batch(step, 4, device=device)) for step in steps]
        return logits

    logits = run_ranks(1, work)[0]
    for plain, computed in zip(logits[:4], logits[4:], strict=True):
        torch.testing.assert_close(computed, plain, atol=1e-4, rtol=0)
