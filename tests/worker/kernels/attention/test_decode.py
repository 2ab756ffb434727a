import pytest
import torch

from harness.kernels.kernel_checks import paged_cache, relative_error, tolerance
from mgpu.worker.kernels.attention.decode import DecodeTiling, choose_tiling, decode_attention
from mgpu.worker.kernels.attention.inputs import PackedHeads, PagedCache
from mgpu.worker.kernels.attention.rope_cache import rope_and_cache
from mgpu.worker.kernels.reference import paged_attention
from mgpu.worker.kernels.runtime import Workspace

CASES = [
    # context lengths, block size, KV heads, group, head dim, window, splits
    ([1, 70, 33], 16, 2, 1, 64, None, 1),
    ([130, 5], 32, 1, 4, 128, None, 4),
    ([65, 64, 63], 64, 1, 8, 64, None, 2),
    ([200], 16, 1, 3, 64, 50, 4),
    ([20, 90], 16, 1, 2, 256, 40, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lens", "block_size", "kv_heads", "group", "dim", "window", "splits"), CASES)
def test_decode_attention_equals_reference(
    device: torch.device,
    dtype: torch.dtype,
    lens: list[int],
    block_size: int,
    kv_heads: int,
    group: int,
    dim: int,
    window: int | None,
    splits: int,
) -> None:
    cache = paged_cache(lens, block_size, kv_heads, dim, dtype, device)
    q = torch.randn(len(lens), kv_heads * group, dim, device=device).to(dtype)
    starts = list(range(len(lens) + 1))
    tiling = DecodeTiling(splits, 32, 32)
    # Sinks far below, among and far above the scores.
    for sinks in (None, torch.linspace(-20, 9, kv_heads * group, device=device).to(dtype)):
        expected = paged_attention(q, cache.k, cache.v, cache.tables, lens, starts, dim**-0.5, window, sinks_H=sinks)
        got = decode_attention(q, cache.inputs(), scale=dim**-0.5, window=window, sinks_H=sinks, tiling=tiling)
        assert relative_error(got, expected) < tolerance(dtype)


@pytest.mark.parametrize("chunk", [48, 64])
def test_a_token_sees_its_own_chunk_alone(device: torch.device, chunk: int) -> None:
    lens = [1, chunk, chunk + 1, 150]
    cache = paged_cache(lens, 16, 1, 64, torch.float32, device)
    q = torch.randn(len(lens), 2, 64, device=device)
    expected = paged_attention(q, cache.k, cache.v, cache.tables, lens, list(range(5)), 0.125, chunk, in_chunks=True)
    tiling = DecodeTiling(2, 32, 32)
    got = decode_attention(q, cache.inputs(), scale=0.125, window=chunk, in_chunks=True, tiling=tiling)
    assert relative_error(got, expected) < tolerance(torch.float32)


@pytest.mark.parametrize(
    ("lens", "block_size", "kv_heads", "group", "dim", "window", "tiling"),
    [
        ([150, 40], 16, 2, 2, 64, None, DecodeTiling(1, 32, 32)),
        ([150, 40], 16, 2, 2, 64, None, DecodeTiling(4, 32, 32)),
        ([1, 65, 64], 64, 2, 4, 128, None, None),
        ([200, 3], 64, 1, 3, 64, 50, DecodeTiling(2, 32, 32)),
        ([33], 16, 1, 2, 256, 20, DecodeTiling(1, 32)),
        ([200], 64, 1, 2, 256, None, None),
    ],
)
def test_decode_attention_reads_a_float8_cache(
    device: torch.device,
    lens: list[int],
    block_size: int,
    kv_heads: int,
    group: int,
    dim: int,
    window: int | None,
    tiling: DecodeTiling | None,
) -> None:
    cache = paged_cache(lens, block_size, kv_heads, dim, torch.float8_e4m3fn, device)
    q = torch.randn(len(lens), kv_heads * group, dim, device=device).to(torch.bfloat16)
    k, v, starts = cache.k.float() * 0.5, cache.v.float() * 2.0, list(range(len(lens) + 1))
    expected = paged_attention(q, k, v, cache.tables, lens, starts, dim**-0.5, window)
    got = decode_attention(q, cache.inputs(0.5, 2.0), scale=dim**-0.5, window=window, tiling=tiling)
    assert relative_error(got, expected) < tolerance(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("lens", "normalized", "window", "splits"), [([150, 1, 0, 64], False, None, 4), ([70], True, 40, 1)]
)
def test_the_packed_product_is_turned_stored_and_attended_to(
    device: torch.device, dtype: torch.dtype, lens: list[int], normalized: bool, window: int | None, splits: int
) -> None:
    cache = paged_cache(lens, 16, 2, 64, dtype, device)
    k, v = cache.k.clone(), cache.v.clone()
    qkv = torch.randn(len(lens), 4 + 2 * 2, 64, device=device).to(torch.bfloat16)
    row_scales = torch.rand(len(lens), device=device) + 0.5 if normalized or dtype.itemsize == 1 else None
    angles = torch.rand(max(lens), 64, device=device) * 2 - 1
    weights = [torch.rand(64, device=device) + 0.5 for _ in range(2)]
    heads = PackedHeads(qkv, angles, row_scales, *((*weights, 1e-5) if normalized else ()))
    scales = {"k_scale": 0.5, "v_scale": 2.0} if dtype.itemsize == 1 else {}
    places = [int(cache.tables[row, (n - 1) // 16]) * 16 + (n - 1) % 16 if n else -1 for row, n in enumerate(lens)]
    positions, slots = torch.tensor([max(n - 1, 0) for n in lens], device=device), torch.tensor(places, device=device)
    q = rope_and_cache(heads, positions, slots, k, v, **scales)
    options = {"scale": 0.125, "window": window, "tiling": DecodeTiling(splits, 32, 32)}
    expected = decode_attention(q, PagedCache(k, v, cache.tables, cache.lens, **scales), **options)

    got = decode_attention(heads, cache.inputs(**scales), **options)

    torch.testing.assert_close(cache.k.float(), k.float(), equal_nan=True, rtol=0.01, atol=0.01)
    assert torch.equal(cache.v.view(torch.uint8), v.view(torch.uint8))
    assert relative_error(got, expected) < tolerance(torch.bfloat16)


def test_rows_without_context_give_zeros(device: torch.device) -> None:
    cache = paged_cache([0, 10], 16, 1, 64, torch.float32, device)
    got = decode_attention(torch.randn(2, 2, 64, device=device), cache.inputs(), scale=0.125)
    assert not got[0].any()
    assert got[1].isfinite().all()


def test_queries_may_be_a_view_of_the_packed_product(device: torch.device) -> None:
    cache = paged_cache([30], 16, 1, 64, torch.float32, device)
    packed = torch.randn(1, 4, 64, device=device)
    from_view = decode_attention(packed[:, :2], cache.inputs(), scale=0.125)
    from_copy = decode_attention(packed[:, :2].contiguous(), cache.inputs(), scale=0.125)
    assert torch.equal(from_view, from_copy)


def test_counters_are_zero_again_after_a_split_reduction(device: torch.device) -> None:
    workspace = Workspace.create(device, 1 << 14, 16)
    cache = paged_cache([100], 16, 1, 64, torch.float32, device)
    q = torch.randn(1, 2, 64, device=device)
    results = [
        decode_attention(q, cache.inputs(), scale=0.125, tiling=DecodeTiling(4, 32, 32), workspace=workspace)
        for _ in range(2)
    ]
    assert not workspace.counters.any()
    assert torch.equal(*results)


def test_a_workspace_that_is_too_small_is_refused_with_the_numbers(device: torch.device) -> None:
    cache = paged_cache([100], 16, 1, 64, torch.float32, device)
    with pytest.raises(ValueError, match="holds 8 floats and 1 counters, needs 528 and 1"):
        decode_attention(
            torch.randn(1, 2, 64, device=device),
            cache.inputs(),
            scale=0.125,
            tiling=DecodeTiling(4, 32),
            workspace=Workspace.create(device, 8, 1),
        )


def test_tiling_depends_on_the_batch_alone_and_fills_the_device() -> None:
    assert choose_tiling(1, 8, 128, torch.bfloat16).splits == 16
    assert choose_tiling(256, 8, 128, torch.bfloat16).splits == 1
    wide = [choose_tiling(rows, 2, 256, torch.float8_e4m3fn) for rows in (64, 256, 512)]
    assert [(each.splits, each.block_n) for each in wide] == [(2, 64), (1, 64), (1, 32)]
    assert (choose_tiling(64, 2, 256, torch.bfloat16).splits, choose_tiling(64, 2, 256, torch.bfloat16).block_n) == (
        1,
        32,
    )
    tilings = [choose_tiling(rows, 4, 128, torch.bfloat16) for rows in (1, 2)]
    assert [(each.splits, each.block_n) for each in tilings] == [(32, 64), (16, 128)]  # many splits, short stretches
