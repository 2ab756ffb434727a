import itertools

import pytest
import torch

from harness.kernels.kernel_checks import paged_cache, relative_error, tolerance
from mgpu.worker.kernels.attention.prefill import PrefillTiling, prefill_attention
from mgpu.worker.kernels.reference import paged_attention

CASES = [
    # context lengths, query lengths, block size, KV heads, group, head dim, window, tiling
    ([40, 9, 1], [40, 3, 1], 16, 2, 1, 64, None, PrefillTiling(16, 16, 4, 2)),
    ([70, 50], [20, 33], 32, 1, 4, 64, None, PrefillTiling(32, 16, 4, 2, bulk=True)),
    ([70, 50], [20, 33], 16, 1, 2, 64, None, PrefillTiling(32, 32, 4, 2)),
    ([90, 17], [60, 17], 16, 1, 2, 128, 24, PrefillTiling(16, 16, 4, 2, bulk=False)),
    ([64, 65], [64, 1], 64, 1, 8, 128, None, PrefillTiling(64, 32, 4, 2, bulk=True)),
    ([50], [33], 64, 1, 3, 256, 20, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lens", "counts", "block_size", "kv_heads", "group", "dim", "window", "tiling"), CASES)
def test_prefill_attention_equals_reference(
    device: torch.device,
    dtype: torch.dtype,
    lens: list[int],
    counts: list[int],
    block_size: int,
    kv_heads: int,
    group: int,
    dim: int,
    window: int | None,
    tiling: PrefillTiling | None,
) -> None:
    if dtype == torch.float32 and dim == 256 and device.type == "cuda":
        pytest.skip("float32 tiles of 256 exceed shared memory")
    cache = paged_cache(lens, block_size, kv_heads, dim, dtype, device)
    first = 2  # tokens of rows that another kernel serves
    starts = [first]
    for count in counts:
        starts.append(starts[-1] + count)
    q = torch.randn(starts[-1], kv_heads * group, dim, device=device).to(dtype)
    sinks = None if window is None else torch.linspace(-20, 9, kv_heads * group, device=device).to(dtype)
    out = torch.full_like(q, 7.0)
    prefill_attention(
        q,
        cache.inputs(),
        torch.tensor(starts, dtype=torch.int32, device=device),
        scale=dim**-0.5,
        window=window,
        sinks_H=sinks,
        tiling=tiling,
        out_THK=out,
    )
    expected = paged_attention(q, cache.k, cache.v, cache.tables, lens, starts, dim**-0.5, window, sinks_H=sinks)
    assert relative_error(out[first:], expected[first:]) < tolerance(dtype)
    assert (out[:first] == 7.0).all()


@pytest.mark.parametrize("chunk", [24, 32])
def test_tokens_see_their_own_chunks_alone(device: torch.device, chunk: int) -> None:
    lens, starts = [70, 40], [0, 50, 90]  # a part of a prompt that begins within a chunk, and a whole one
    cache = paged_cache(lens, 16, 1, 64, torch.float32, device)
    q = torch.randn(90, 2, 64, device=device)
    expected = paged_attention(q, cache.k, cache.v, cache.tables, lens, starts, 0.125, chunk, in_chunks=True)
    got = prefill_attention(
        q, cache.inputs(), torch.tensor(starts, dtype=torch.int32, device=device), scale=0.125, window=chunk,
        in_chunks=True, tiling=PrefillTiling(16, 16, 4, 2),
    )  # fmt: skip
    assert relative_error(got, expected) < tolerance(torch.float32)


@pytest.mark.parametrize(
    ("lens", "counts", "block_size", "group", "dim", "window", "tiling"),
    [
        ([40], [9], 16, 2, 64, None, PrefillTiling(16, 16, 4, 2)),
        ([70, 50], [20, 33], 64, 1, 128, None, None),
        ([70, 50], [20, 33], 16, 2, 64, None, PrefillTiling(32, 32, 4, 2)),
        ([90, 17], [60, 17], 16, 1, 128, 24, PrefillTiling(16, 16, 4, 2, bulk=False)),
        ([50], [33], 64, 3, 256, 20, None),
    ],
)
def test_prefill_attention_reads_a_float8_cache(
    device: torch.device,
    lens: list[int],
    counts: list[int],
    block_size: int,
    group: int,
    dim: int,
    window: int | None,
    tiling: PrefillTiling | None,
) -> None:
    cache = paged_cache(lens, block_size, 1, dim, torch.float8_e4m3fn, device)
    starts = [0, *itertools.accumulate(counts)]
    q = torch.randn(starts[-1], group, dim, device=device).to(torch.bfloat16)
    starts_device = torch.tensor(starts, dtype=torch.int32, device=device)
    got = prefill_attention(q, cache.inputs(0.5, 2.0), starts_device, scale=dim**-0.5, window=window, tiling=tiling)
    k, v = cache.k.float() * 0.5, cache.v.float() * 2.0
    expected = paged_attention(q, k, v, cache.tables, lens, starts, dim**-0.5, window)
    assert relative_error(got, expected) < tolerance(torch.bfloat16)


def test_rows_without_queries_and_tokens_of_no_row_are_left_alone(device: torch.device) -> None:
    cache = paged_cache([20, 30, 16], 16, 1, 64, torch.float32, device)
    starts = torch.tensor([0, 5, 5, 9], dtype=torch.int32, device=device)
    q = torch.randn(12, 1, 64, device=device)
    out = torch.full_like(q, 7.0)
    prefill_attention(q, cache.inputs(), starts, scale=0.125, tiling=PrefillTiling(16, 16, 4, 2), out_THK=out)
    expected = paged_attention(q, cache.k, cache.v, cache.tables, cache.context_lens, [0, 5, 5, 9], 0.125)
    assert relative_error(out[:9], expected[:9]) < tolerance(torch.float32)
    assert (out[9:] == 7.0).all()
