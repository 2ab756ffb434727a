"""What a worker learns before its first step: memory for the pool, bytes to read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.models.parts import with_changes
from harness.models.tiny_models import TinyModel
from harness.specs import make_plan, make_spec
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.worker.errors import OutOfMemory
from mgpu.worker.ranks.collectives import MeasurableGroup, SingleRank
from mgpu.worker.ranks.links import Links
from mgpu.worker.start.pool_size import cpu_pool_bytes, left_for_pool, pools_of
from mgpu.worker.start.startup import StartUp, bytes_to_read

MakeModel = Callable[[str], TinyModel]
GIB = 1 << 30


@pytest.fixture
def spec(tiny_model: MakeModel) -> WorkerSpec:
    return make_spec(tiny_model("llama").folder, [1])


def lone_links(size: int) -> Links:
    """Return links of a rank whose peers do not exist."""
    group = MeasurableGroup(SingleRank())
    group.size = size
    return Links(group)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("sizes", [[1], [2], [1, 1, 1]], ids=str)
def test_the_largest_step_runs_on_every_stage_without_peers(
    tiny_model: MakeModel, sizes: list[int], family: str
) -> None:
    spec = make_spec(tiny_model(family).folder, sizes, max_batch_tokens=300, max_seq_len=128)
    for stage_index in range(len(sizes)):
        rank = spec.layout.placement.ranks_of_stage(stage_index)[0]
        links = lone_links(sizes[stage_index])
        start_up = StartUp(spec, spec.layout.placement.place_of(rank), torch.device("cpu"), links)
        stage, _ = start_up.load(lambda done, total: None)
        start_up.run_largest_step(stage)
        assert not links.group.alone
        assert start_up.measure(stage).num_blocks > 0


def test_ranks_on_one_gpu_split_what_is_left(spec: WorkerSpec) -> None:
    alone = left_for_pool(spec, 0, 70 * GIB, 80 * GIB, 2 * GIB)
    assert alone == pytest.approx((0.9 * 80 - 10 - 2) * GIB, abs=2)
    plan = make_plan(3, [2, 1])
    plan = replace(plan, stages=tuple(replace(stage, devices=(0,) * len(stage.devices)) for stage in plan.stages))
    shared = left_for_pool(with_changes(spec, placement=plan), 0, 70 * GIB, 80 * GIB, 2 * GIB)
    assert shared == pytest.approx(((0.9 * 80 - 10) / 3 - 2) * GIB, abs=2)


def test_a_full_gpu_is_an_error_with_the_numbers_and_the_way_out(spec: WorkerSpec) -> None:
    with pytest.raises(
        OutOfMemory, match=r"GPU 0: weights and others take 75\.0 of 80\.0 GiB.*needs 2\.0 GiB"
    ) as error:
        left_for_pool(spec, 0, 5 * GIB, 80 * GIB, 2 * GIB)
    assert "--memory-fraction" in str(error.value)


def test_the_pool_is_no_larger_than_all_rows_at_full_length(spec: WorkerSpec) -> None:
    assert pools_of(spec, GIB, 1 << 20, 0) == (8 * 9, 0)  # 8 rows of 129 tokens in blocks of 16
    assert pools_of(spec, 10 << 20, 1 << 20, 0) == (10, 0)


def test_workers_on_a_cpu_take_what_they_are_told_or_a_share(spec: WorkerSpec) -> None:
    assert cpu_pool_bytes(replace(spec, kv_memory=12345)) == 12345
    assert 0 < cpu_pool_bytes(replace(spec, kv_memory=0)) <= 2 * GIB


def test_progress_totals_are_what_the_loader_reads(tiny_model: MakeModel) -> None:
    folder: Path = tiny_model("llama").folder
    for sizes in ([1], [1, 1]):
        spec = make_spec(folder, sizes)
        for rank in range(len(sizes)):
            reports: list[tuple[int, int]] = []
            start_up = StartUp(spec, spec.layout.placement.place_of(rank), torch.device("cpu"), lone_links(1))
            stage, read = start_up.load(lambda done, total, to=reports: to.append((done, total)))
            assert reports[-1] == (read, bytes_to_read(read_checkpoint(folder), stage, 1))
            assert read == reports[-1][1]
