"""Whole stages with quantized linear layers: what layouts share, and what loading holds at once."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.models.random_model import write_random_model
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import CPU, Stages, logits_in_chunks
from harness.servers.fake_orchestrator import running
from harness.specs import make_spec
from mgpu.orchestrator.placement.split.sizes import largest_matrix_bytes, rank_weight_bytes
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.internal.worker_messages import Loaded
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import PlacementPlan, RankPlace, Stage
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.models.build import build_stage, init_dummy_weights
from mgpu.worker.ranks.collectives import SingleRank

IDS = [5, 90, 17, 3, 44, 61, 8, 29, 70, 11]
EVERY: list[Quant] = ["8", "4", "fp8"]


def logits(checkpoint: Checkpoint, quant: Quant, tp_size: int = 1, num_stages: int = 1) -> Tensor:
    return logits_in_chunks(checkpoint, IDS, [6, 1, 1, 1, 1], tp_size, num_stages, quant=quant)


@pytest.mark.parametrize(("quant", "error"), [("8", 0.02), ("fp8", 0.08), ("4", 0.18)])
def test_logits_stay_near_those_of_the_dense_model(checkpoint: Checkpoint, quant: Quant, error: float) -> None:
    dense = logits(checkpoint, "none")
    assert 0 < (logits(checkpoint, quant) - dense).norm() < error * dense.norm()


@pytest.mark.parametrize("quant", EVERY)
def test_layer_mapping_changes_nothing(checkpoint: Checkpoint, quant: Quant) -> None:
    torch.testing.assert_close(logits(checkpoint, quant, num_stages=2), logits(checkpoint, quant), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_int4_ranks_give_the_logits_of_one_worker(checkpoint: Checkpoint, tp_size: int) -> None:
    torch.testing.assert_close(logits(checkpoint, "4", tp_size), logits(checkpoint, "4"), atol=1e-4, rtol=0)


def test_int8_ranks_differ_in_row_parallel_scales_only(checkpoint: Checkpoint) -> None:
    whole, split = (
        run_ranks(1, lambda group: held(checkpoint, group, "8"))[0],
        run_ranks(2, lambda group: held(checkpoint, group, "8")),
    )
    mine = split[0]["layers.0.mlp.gate_up"]
    assert torch.equal(mine, whole["layers.0.mlp.gate_up"][[*range(128), *range(256, 384)]])
    down = torch.stack([part["layers.0.mlp.down"] for part in split])
    assert torch.equal(down.amax(0), whole["layers.0.mlp.down"])  # a whole row's scale is the larger of its parts'
    assert not torch.equal(down[0], down[1])


def test_fp8_scales_are_powers_of_two_for_whole_matrices(checkpoint: Checkpoint) -> None:
    for scales in run_ranks(2, lambda group: held(checkpoint, group, "fp8"))[1].values():
        assert (scales == scales[0, 0]).all()
        assert torch.frexp(scales[0, 0])[0] == 0.5


def held(checkpoint: Checkpoint, group: ThreadGroup, quant: Quant) -> dict[str, Tensor]:
    """Load one rank's stage and give the scales of its linear layers by name."""
    [stage] = Stages(checkpoint, group, [range(3)], quant=quant).stages
    named = ((name, getattr(module, "packed", None)) for name, module in stage.named_modules())
    return {name: packed.scales for name, packed in named if packed is not None}


@pytest.mark.parametrize("quant", ["none", *EVERY])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_planner_counts_the_bytes_that_a_rank_holds(checkpoint: Checkpoint, quant: Quant, tp_size: int) -> None:
    facts = checkpoint.facts
    plan = PlacementPlan((Stage(0, 2, tuple(range(tp_size))), Stage(2, 3, tuple(range(tp_size, 2 * tp_size)))))
    sizes = run_ranks(
        tp_size,
        lambda group: [
            stage.weight_bytes() for stage in Stages(checkpoint, group, [range(2), range(2, 3)], quant=quant).stages
        ],
    )
    for rank, (first, last) in enumerate(sizes):
        assert first == rank_weight_bytes(facts, plan, plan.place_of(rank), 4, quant)
        assert last == rank_weight_bytes(facts, plan, plan.place_of(tp_size + rank), 4, quant)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that torch makes in this thread while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.layout == torch.strided:  # a packed head is opaque
            self._watch(result)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key and key not in self.live:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None)
            self.peak = max(self.peak, sum(self.live.values()))


def bytes_of_loading(facts: ModelFacts, quant: Quant) -> tuple[int, int]:
    """Return the peak of bytes alive while a stage was built and filled, and the bytes it holds in the end."""
    with LiveBytes() as memory:
        place = RankPlace(0, 0, 0, 1, 0)
        stage = build_stage(facts, place, range(facts.num_layers), SingleRank(), torch.float32, CPU, quant)
        init_dummy_weights(stage, 0)
    return memory.peak, stage.weight_bytes()


@pytest.mark.parametrize("quant", EVERY)
def test_loading_holds_one_dense_matrix_beside_the_quantized_shard(tmp_path: Path, quant: Quant) -> None:
    facts = read_checkpoint(
        write_random_model(tmp_path, hidden_size=256, intermediate_size=2048, num_hidden_layers=6)
    ).facts
    peak, held = bytes_of_loading(facts, quant)
    dense_peak, dense_held = bytes_of_loading(facts, "none")
    assert dense_peak >= dense_held  # the counter sees all weights
    assert held < 0.35 * dense_held
    # Chunks of 32,768 weights are copied a few times while they are quantized.
    assert peak <= held + largest_matrix_bytes(facts, 1, 4) + (4 << 20)
    assert peak < 0.6 * dense_held


@pytest.mark.parametrize("quant", EVERY)
def test_a_worker_process_quantizes_as_its_spec_says(random_model: Path, tmp_path: Path, quant: Quant) -> None:
    spec = make_spec(random_model, [1], quant=quant)
    with running(spec, tmp_path) as workers:
        workers.make_ready()
        tokens = workers.generate(IDS, 3)
        workers.shut_down()
    checkpoint = read_checkpoint(random_model)
    assert tokens[0] == int(logits(checkpoint, quant)[-1].argmax())
    [loaded] = [message for message in workers.seen if isinstance(message, Loaded)]
    whole = PlacementPlan((Stage(0, 3, (0,)),))
    assert loaded.weight_bytes < 0.6 * rank_weight_bytes(checkpoint.facts, whole, RankPlace(0, 0, 0, 1, 0), 4)
