"""Which sums kernels make, by size, and what happens if a rank cannot use them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.models.random_model import write_random_model
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import PlacementPlan, Stage
from mgpu.protocol.model.shared_memory_layout import PAGE, shared_layout
from mgpu.worker.kernels.peers.memory import PeerAlarm, buffer_bytes, cut
from mgpu.worker.layers.products import cpu_matmul
from mgpu.worker.ranks.collectives import DistGroup, MeasurableGroup, SingleRank, ThroughHost
from mgpu.worker.ranks.peer_group import MOST_ROWS, PeerGroup, ReduceLimits, area_shapes, captured_rows, peers_of
from mgpu.worker.ranks.peer_setup import SWITCH, PeerSetup, refusal

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ranks", "dim", "rows"), [(2, 4096, 512), (2, 16384, 256), (4, 8192, 24), (8, 4096, 20), (8, 131072, 1)], ids=str
)
def test_one_shot_is_for_small_messages(ranks: int, dim: int, rows: int) -> None:
    limits = ReduceLimits.of(ranks, dim, torch.bfloat16)
    assert (limits.one_shot_rows, limits.two_shot_rows) == (rows, MOST_ROWS)


@pytest.mark.parametrize(("ranks", "dim", "areas"), [(2, 4096, 4), (3, 5120, 4), (8, 8192, 4), (8, 16, 2)], ids=str)
def test_there_is_memory_for_two_shots_where_every_rank_has_a_part(ranks: int, dim: int, areas: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    shapes = area_shapes(ReduceLimits.of(ranks, dim, torch.bfloat16))
    assert len(shapes) == areas
    assert buffer_bytes(shapes) < 64 << 20


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("dim", [64, 4096, 8192])
def test_the_shared_file_has_room_for_the_areas_of_every_rank(ranks: int, dim: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    plan = PlacementPlan((Stage(0, 2, tuple(range(ranks))),))
    shared = shared_layout(Layout(plan, "bfloat16", "nccl", "none"), StepLimits(16, 256, 2048, 4096), dim)
    needed = buffer_bytes(area_shapes(ReduceLimits.through_host(ranks, dim, torch.bfloat16)))
    assert all(needed <= region.nbytes < needed + PAGE for region in shared.sums[0])


def test_sums_are_captured_as_far_as_kernels_or_the_library_can() -> None:
    library = DistGroup(None, 0, 2)  # type: ignore[arg-type]
    assert captured_rows(MeasurableGroup(library)) == 0
    assert captured_rows(ThroughHost(library)) == 0
    library.is_capturable = True
    assert captured_rows(MeasurableGroup(library)) > 1 << 20
    assert captured_rows(ThroughHost(library)) == 0, "copies to the host are no part of a graph"
    assert captured_rows(SingleRank()) > 1 << 20


def test_kernels_that_add_up_a_few_rows_leave_the_rest_to_the_library() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    limits, library = ReduceLimits.through_host(2, 64, torch.float32), DistGroup(None, 0, 2)  # type: ignore[arg-type]
    shapes = area_shapes(limits)
    areas = cut(torch.zeros(buffer_bytes(shapes), dtype=torch.uint8), [0, 0], shapes)
    alarm = PeerAlarm(torch.zeros(1), torch.zeros(1), 1)
    group = PeerGroup(library, areas, alarm, limits, most_rows=16)
    assert (group.takes(torch.zeros(16, 64)), group.takes(torch.zeros(17, 64))) == (True, False)
    assert captured_rows(group) == 16
    library.is_capturable = True
    assert captured_rows(group) > 1 << 20


class Adds:
    """Stands for a kernel, or the library: adds 1, and notes how it was called."""

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows
        self.calls: list[tuple[object, ...]] = []

    def __call__(self, part_TD: Tensor, sum_TD: Tensor, *rest: object) -> Tensor:
        self.calls.append((len(part_TD), sum_TD is part_TD, *rest))
        return sum_TD.add_(1)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append((len(x),))
        return x + 2


def test_a_sum_is_made_in_place_by_the_kernel_for_its_size_or_by_the_library() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    limits = ReduceLimits(2, 64, torch.float32, one_shot_rows=4, two_shot_rows=16)
    shapes = area_shapes(limits)
    areas = cut(torch.zeros(buffer_bytes(shapes), dtype=torch.uint8), [0, 0], shapes)
    alarm = PeerAlarm(torch.zeros(1), torch.zeros(1), 1)
    group = PeerGroup(DistGroup(None, 0, 2), areas, alarm, limits)  # type: ignore[arg-type]
    one, two, library = Adds(group.one_shot.rows), Adds(), Adds()
    group.one_shot, group.two_shot, group.inner = one, two, library  # type: ignore[assignment]
    for rows in (1, 4, 5, 16):
        x_TD = torch.zeros(rows, 64)
        assert group.all_reduce(x_TD) is x_TD
        assert bool((x_TD == 1).all())
    assert group.all_reduce(torch.zeros(17, 64)).max() == 2
    assert group.all_reduce(torch.zeros(4, 32)).max() == 2
    assert one.calls == [(1, True, None, None), (4, True, None, None)]
    assert two.calls == [(5, True, None, None), (16, True, None, None)]
    assert library.calls == [(17,), (4,)]


def test_a_rank_that_cannot_makes_all_keep_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_one(group: ThreadGroup) -> tuple[bool, str, Tensor]:
        setup = PeerSetup(group, group, CPU)
        opened = setup.open(ReduceLimits.of(group.size, 64, torch.float32), 1.0)
        setup.close()
        return opened is group, setup.note, opened.all_reduce(torch.ones(2))

    for is_same, note, total in run_ranks(3, open_one):
        assert is_same
        assert note == "partial sums do not go by own kernels: rank 0 of 3: kernels are not used"
        assert total.tolist() == [3.0, 3.0]
    monkeypatch.setenv(SWITCH, "0")
    assert refusal(ReduceLimits.of(2, 64, torch.float32), CPU) == "MGPU_PEER_REDUCE=0"


def test_a_rank_that_works_alone_waits_for_no_peers() -> None:
    group = MeasurableGroup(SingleRank())
    assert peers_of(group) is None
    group.alone = True
    assert peers_of(group) is None


class FusedThreads:
    """Does by threads what `PeerGroup` does by kernels."""

    in_float8 = False

    products = 0

    def __init__(self, group: ThreadGroup) -> None:
        self._group = group
        self._sent: list[Tensor] = []

    def takes_product(self, x_TK: Tensor, w_NK: Tensor) -> bool:
        return len(x_TK) == 1 and w_NK.shape[-1] == x_TK.shape[1]

    def send_product(self, x_1K: Tensor, w_NK: Tensor) -> None:
        assert not self._sent
        type(self).products += 1
        self._sent.append(cpu_matmul.matmul(x_1K, w_NK))

    def add_sent(self, bias_D: Tensor | None, device: torch.device) -> Tensor:
        total_1D = self._group.all_reduce(self._sent.pop())
        return total_1D if bias_D is None else total_1D + bias_D

    def add_sent_and_norm(self, residual_1D: Tensor, bias_D: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        return self.add_and_norm(residual_1D, self._sent.pop(), bias_D, weight_D, eps)

    def takes(self, x: Tensor) -> bool:
        return len(x) < 4

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(x)

    def add_and_norm(
        self, residual_TD: Tensor, part_TD: Tensor, bias_D: Tensor | None, weight_D: Tensor, eps: float
    ) -> Tensor:
        total_TD = self._group.all_reduce(part_TD)
        residual_TD += total_TD if bias_D is None else total_TD + bias_D
        return torch.nn.functional.rms_norm(residual_TD, weight_D.shape, weight_D, eps)


def test_norms_that_add_up_give_the_logits_of_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_checkpoint(write_random_model(tmp_path, attention_bias=True, mlp_bias=True))
    ids, chunks = list(range(3, 13)), [5, 1, 3, 1]  # sums of both kinds
    expected = logits_in_chunks(checkpoint, ids, chunks, tp_size=2)
    monkeypatch.setattr("mgpu.worker.layers.partial_sum.peers_of", FusedThreads)
    monkeypatch.setattr(FusedThreads, "products", 0)
    torch.testing.assert_close(logits_in_chunks(checkpoint, ids, chunks, tp_size=2), expected)
    assert FusedThreads.products > 0, "no product of one row was sent while it was computed"


def test_a_product_is_sent_where_its_row_goes_through_memory_of_peers() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    group = one_rank(ReduceLimits(1, 64, torch.float32, one_shot_rows=4, two_shot_rows=4))
    x_1K, w_DK = torch.randn(1, 32), torch.randn(64, 32)
    assert group.takes_product(x_1K, w_DK)
    assert not group.takes_product(torch.randn(2, 32), w_DK)
    assert not group.takes_product(x_1K, torch.randn(48, 32))
    assert not group.takes_product(x_1K.half(), w_DK.half())
    assert not group.takes_product(x_1K, torch.empty(0)), "a quantized layer has no dense weight"
    on_host = ReduceLimits(1, 64, torch.float32, one_shot_rows=4, two_shot_rows=4, is_on_host=True)
    assert not one_rank(on_host).takes_product(x_1K, w_DK)
    group.send_product(x_1K, w_DK)
    assert not group.takes_product(x_1K, w_DK), "the first one is not added up yet"
    with pytest.raises(AssertionError, match="added up before"):
        group.all_reduce(torch.zeros(1, 64))
    torch.testing.assert_close(group.add_sent(None, CPU), x_1K @ w_DK.T)
    assert group.takes_product(x_1K, w_DK)


def one_rank(limits: ReduceLimits) -> PeerGroup:
    """Return a group of this process alone, whose kernels are interpreted."""
    shapes = area_shapes(limits)
    buffer = torch.zeros(buffer_bytes(shapes), dtype=torch.uint8)
    alarm = PeerAlarm(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 100)
    library = DistGroup(None, 0, limits.ranks)  # type: ignore[arg-type]
    return PeerGroup(library, cut(buffer, [buffer.data_ptr()], shapes), alarm, limits)
