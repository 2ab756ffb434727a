"""Keys and values kept as float8: answers stay near, and are the same for any layout and any steps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.ranks.stage_driver import logits_in_chunks
from harness.servers.fake_orchestrator import running
from harness.specs import make_spec
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.internal.worker_messages import Loaded
from mgpu.protocol.model.facts import KvCacheDtype
from mgpu.worker.state.kv_cache import FP8, KvCache, to_stored, widen

IDS = [5, 90, 17, 3, 44, 61, 8, 29, 70, 11]
CHUNKS = [6, 1, 1, 1, 1]


def logits(
    checkpoint: Checkpoint,
    kept: KvCacheDtype = "fp8",
    chunks: list[int] = CHUNKS,
    sizes: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return logits_in_chunks(checkpoint, IDS, chunks, *sizes, dtype=dtype, kv_cache_dtype=kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_stay_near_those_of_the_wide_cache(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    wide = logits(checkpoint, "auto")
    assert 0 < (logits(checkpoint, dtype=dtype) - wide).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize("chunks", [[10], [3, 7], [1] * 10], ids=str)
def test_no_cut_of_the_prompt_changes_the_answer(checkpoint: Checkpoint, chunks: list[int]) -> None:
    torch.testing.assert_close(logits(checkpoint, chunks=chunks), logits(checkpoint), atol=2e-3, rtol=0)


@pytest.mark.parametrize("sizes", [(2, 1), (4, 1), (1, 3)], ids=["2 ranks", "4 ranks", "3 stages"])
def test_layouts_give_the_logits_of_one_worker(checkpoint: Checkpoint, sizes: tuple[int, int]) -> None:
    torch.testing.assert_close(logits(checkpoint, sizes=sizes), logits(checkpoint), atol=2e-3, rtol=0)


def test_what_is_too_large_saturates() -> None:
    big = torch.tensor([1e6, -1e6, torch.inf, 448.0, 17.0])
    assert to_stored(big, FP8).float().tolist() == [448.0, -448.0, 448.0, 448.0, 16.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_widened_exactly(dtype: torch.dtype) -> None:
    stored = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127].view(FP8)
    assert torch.equal(widen(stored, torch.empty(254, dtype=dtype)).float(), stored.float())


def test_a_cache_gives_back_what_it_stores() -> None:
    (layer,) = KvCache(1, 2, 4, 2, 16, FP8, torch.device("cpu")).layers
    slots = torch.tensor([6, 1])
    k_TJK, v_TJK = layer.write(slots, torch.randn(2, 2, 16), torch.randn(2, 2, 16) * 1e3)
    assert torch.equal(layer.k_NJK.float()[slots], k_TJK)
    assert torch.equal(layer.v_NJK.float()[slots], v_TJK)


def test_worker_processes_keep_a_byte_per_component(random_model: Path, tmp_path: Path) -> None:
    answers, block_bytes = [], []
    for sizes in ([1], [2], [1, 1]):
        with running(make_spec(random_model, sizes, kv_cache_dtype="fp8"), tmp_path) as workers:
            workers.make_ready()
            answers.append(workers.generate(IDS, 6))
            workers.shut_down()
        block_bytes.append([seen.block_bytes for seen in workers.seen if isinstance(seen, Loaded)])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] == int(logits(read_checkpoint(random_model))[-1].argmax())
    assert block_bytes[0] == [2 * 3 * 16 * 2 * 32]
    assert block_bytes[1] == [3 * 16 * 2 * 32] * 2
