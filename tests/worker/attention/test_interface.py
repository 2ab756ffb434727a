"""The plain backend equals attention written out with full matrices, and never reads what was not written."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from harness.ranks.stage_driver import Row, make_batch
from mgpu.protocol.model.attention_facts import Sight
from mgpu.worker.attention.choose import select_backend
from mgpu.worker.attention.interface import AttentionShape, AttentionSpec
from mgpu.worker.attention.plain_backend import PlainBackend
from mgpu.worker.state.kv_cache import KvCache

BLOCK = 4
DIM = 16


@dataclass
class History:
    """One request's true queries, keys and values at all positions, [P, heads, DIM] each."""

    q: Tensor
    k: Tensor
    v: Tensor


def make_history(length: int, num_q: int, num_kv: int, dtype: torch.dtype) -> History:
    q, k, v = (torch.randn(length, heads, DIM).to(dtype) for heads in (num_q, num_kv, num_kv))
    return History(q, k, v)


def expected(history: History, first: int, end: int, spec: AttentionSpec) -> Tensor:
    """Attend for positions [first, end) with explicit scores in float64."""
    groups = history.q.shape[1] // history.k.shape[1]
    q_QHK = history.q[first:end].double()
    k_SHK, v_SHK = (x[:end].double().repeat_interleave(groups, dim=1) for x in (history.k, history.v))
    scores_HQS = torch.einsum("qhk,shk->hqs", q_QHK, k_SHK) * spec.scale
    queries, keys = torch.arange(first, end)[:, None], torch.arange(end)[None, :]
    hidden = keys > queries
    if spec.window is not None and spec.in_chunks:
        hidden |= keys // spec.window < queries // spec.window
    elif spec.window is not None:
        hidden |= keys <= queries - spec.window
    return torch.einsum("hqs,shk->qhk", scores_HQS.masked_fill(hidden, -torch.inf).softmax(-1), v_SHK)


def nan_cache(num_blocks: int, num_kv: int, dtype: torch.dtype) -> KvCache:
    cache = KvCache(1, num_blocks, BLOCK, num_kv, DIM, dtype, torch.device("cpu"))
    cache.layers[0].k_NBJK.fill_(torch.nan)
    cache.layers[0].v_NBJK.fill_(torch.nan)
    return cache


def run_steps(
    histories: list[History], rows: list[Row], steps: list[dict[int, int]], cache: KvCache, spec: AttentionSpec
) -> None:
    """Run steps (row number to new tokens) and compare every output with the expected one."""
    backend = select_backend(torch.device("cpu"), AttentionShape(4, 2, 16, torch.float32, (None,)))
    for step in steps:
        spans = {row: (rows[row].done, rows[row].done + count) for row, count in step.items()}
        batch = make_batch([(rows[row], [0] * count) for row, count in step.items()], BLOCK)
        q, k, v = (
            torch.cat([getattr(histories[row], name)[slice(*span)] for row, span in spans.items()]) for name in "qkv"
        )
        out = backend.begin_step(batch, BLOCK).attend(q, k, v, cache.layers[0], spec)
        want = torch.cat([expected(histories[row], *span, spec) for row, span in spans.items()])
        tolerance = 1e-5 if q.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)


def shuffled_rows(lengths: list[int]) -> tuple[list[Row], int]:
    """Return rows with scattered blocks, and the number of blocks."""
    sizes = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(sizes) + 3).tolist()
    return [Row([order.pop() for _ in range(size)]) for size in sizes], sum(sizes) + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sight", [(None, False), (1, False), (5, False), (1000, False), (5, True), (8, True)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
def test_mixed_steps_equal_full_attention(heads: tuple[int, int], sight: Sight, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    lengths = [23, 9, 14, 1]
    rows, num_blocks = shuffled_rows(lengths)
    histories = [make_history(length, *heads, dtype) for length in lengths]
    steps: list[dict[int, int]] = [
        {0: 7},
        {0: 6, 1: 1, 3: 1},
        {1: 1, 0: 1, 2: 12},
        {2: 1, 0: 1, 1: 1},
        {0: 8, 1: 3},
        {1: 1, 2: 1},
    ]
    run_steps(
        histories, rows, steps, nan_cache(num_blocks, heads[1], dtype), AttentionSpec(0.3, sight[0], in_chunks=sight[1])
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("is_scattered", [False, True])
def test_a_single_context_is_gathered_only_if_its_blocks_are_scattered(
    monkeypatch: pytest.MonkeyPatch, window: int | None, is_scattered: bool
) -> None:
    gathered: list[str] = []
    gather = PlainBackend.gather

    def counted(*arguments: object) -> Tensor:
        gathered.append("once")
        return gather(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PlainBackend, "gather", counted)
    blocks = [2, 3, 4, 5, 6, 7]
    rows = [Row(blocks[::-1] if is_scattered else blocks)]
    steps = [{0: 17}, {0: 4}, {0: 1}, {0: 1}]
    history, cache = make_history(23, 6, 2, torch.bfloat16), nan_cache(9, 2, torch.bfloat16)
    run_steps([history], rows, steps, cache, AttentionSpec(0.3, window))
    assert bool(gathered) == is_scattered


@pytest.mark.parametrize("sight", [(None, False), (300, False), (300, True)], ids=str)
def test_decoding_rows_of_very_different_lengths_equal_full_attention(sight: Sight) -> None:
    torch.manual_seed(2)
    lengths = [1200, 3, 600, 250, 40]
    rows, num_blocks = shuffled_rows(lengths)
    histories = [make_history(length, 6, 2, torch.float32) for length in lengths]
    steps = [{row: length - 1 for row, length in enumerate(lengths)}, dict.fromkeys(range(5), 1)]
    run_steps(
        histories,
        rows,
        steps,
        nan_cache(num_blocks, 2, torch.float32),
        AttentionSpec(0.25, sight[0], in_chunks=sight[1]),
    )
