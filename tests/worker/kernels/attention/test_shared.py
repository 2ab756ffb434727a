"""Attention over the cache of another layer: kernels agree with plain torch, and leave the cache as it is."""

import pytest
import torch

from harness.ranks.stage_driver import Row, make_batch
from mgpu.worker.attention.interface import AttentionSpec, HeadNorms
from mgpu.worker.attention.plain_backend import PlainBackend
from mgpu.worker.attention.triton_backend import TritonBackend
from mgpu.worker.layers.attention.rotary import RotaryEmbedding, rotate
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.state.kv_cache import LayerCache

NUM_Q, NUM_KV, DIM, BLOCK = 4, 2, 32, 16


@pytest.mark.parametrize("counts", [(1, 1), (1, 9)], ids=["decode", "mixed"])
@pytest.mark.parametrize("window", [None, 6])
def test_queries_alone_attend_to_what_is_stored(
    device: torch.device, counts: tuple[int, ...], window: int | None
) -> None:
    rows = [Row([3, 1], done=18), Row([0, 2], done=7)]
    batch = make_batch([(row, [5] * count) for row, count in zip(rows, counts, strict=True)], BLOCK, device=device)
    cache = LayerCache(*(torch.randn(4, BLOCK, NUM_KV, DIM, device=device) for _ in "kv"))
    before = cache.k_NBJK.clone(), cache.v_NBJK.clone()
    norm = RMSNorm(DIM, 1e-6, torch.float32, device, of_heads=True)
    norm.weight.normal_()
    spec = AttentionSpec(1.0, window, HeadNorms(norm.weight, norm.weight, norm.eps))
    rotary = RotaryEmbedding(DIM, 1e4, None, device)
    q_THK = torch.randn(sum(counts), NUM_Q, DIM, device=device)
    turned_THK = rotate(norm(q_THK), rotary(batch.positions, torch.float32, 64))
    expected = PlainBackend().begin_step(batch, BLOCK).attend_shared(turned_THK, cache, spec)
    step = TritonBackend().begin_step(batch, BLOCK)
    found = step.attend_shared_packed(q_THK, None, rotary.table(64), cache, spec)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(cache.k_NBJK, before[0])
    assert torch.equal(cache.v_NBJK, before[1])
