"""Tiny mixtures of experts equal transformers, with experts split both ways, on every layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.random_model import write_random_model
from harness.rank_threads import run_ranks
from harness.stage_driver import Stages, logits_in_chunks
from harness.tiny_models import TinyModel
from mgpu.orchestrator.placement.sizes import rank_weight_bytes
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.model.facts import ExpertSplit
from mgpu.protocol.model.placement import PlacementPlan, Stage
from mgpu.protocol.model.quantization import Quant

FAMILIES = ("mixtral", "mixtral-window", "qwen3-moe", "qwen3-moe-plain")
SPLITS: tuple[ExpertSplit, ...] = ("tensor", "parallel")
LAYOUTS = [(1, 1, "tensor"), (1, 2, "tensor"), *((size, 2 // (size // 2), each) for size in (2, 4) for each in SPLITS)]
"""Ranks of a stage, stages, and how ranks share experts."""
MakeModel = Callable[[str], TinyModel]


@pytest.mark.parametrize(("tp_size", "num_stages", "split"), LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_transformers(
    tiny_model: MakeModel, family: str, tp_size: int, num_stages: int, split: ExpertSplit
) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    chunks = [len(model.prompt_ids)] + [1] * len(model.output_ids)
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, chunks, tp_size, num_stages, expert_split=split)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)
    assert logits[len(model.prompt_ids) - 1 : -1].argmax(-1).tolist() == model.output_ids


def stack_experts(folder: Path, target: Path, prefix: str, names: tuple[str, str, str]) -> None:
    """Copy a model with each layer's experts stacked in two tensors, as transformers holds them in memory."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    gate, up, down = names
    for layer in range(3):
        experts = f"model.layers.{layer}.{prefix}.experts"
        if f"{experts}.0.{gate}.weight" not in tensors:
            continue
        parts = [[tensors.pop(f"{experts}.{e}.{name}.weight") for e in range(6)] for name in (gate, up, down)]
        tensors[f"{experts}.gate_up_proj"] = torch.cat([torch.stack(parts[0]), torch.stack(parts[1])], dim=1)
        tensors[f"{experts}.down_proj"] = torch.stack(parts[2])
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("family", "prefix", "names"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3-moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_stacked_experts_are_read_like_separate_ones(
    tiny_model: MakeModel, tmp_path: Path, family: str, prefix: str, names: tuple[str, str, str], split: ExpertSplit
) -> None:
    model = tiny_model(family)
    stack_experts(model.folder, tmp_path, prefix, names)
    ids = model.prompt_ids + model.output_ids
    logits = logits_in_chunks(read_checkpoint(tmp_path), ids, [len(ids)], 2, expert_split=split)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def random_experts(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random weights whose slices are whole int4 groups, with a dense layer among those with experts."""
    folder = write_random_model(
        tmp_path_factory.mktemp("random-experts"), architectures=["Qwen3MoeForCausalLM"], head_dim=32, num_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=128, mlp_only_layers=[1],
    )  # fmt: skip
    return read_checkpoint(folder)


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_read_their_own_experts_only(random_experts: Checkpoint, split: ExpertSplit) -> None:
    stored = sum(entry.nbytes for entry in random_experts.tensors.values())
    whole = ("norm.weight", "mlp.gate.weight")
    replicated = sum(entry.nbytes for name, entry in random_experts.tensors.items() if name.endswith(whole))
    read = run_ranks(2, lambda group: Stages(random_experts, group, [range(3)], expert_split=split).bytes_read)
    assert sum(read) == stored + replicated


@pytest.mark.parametrize("quant", ["none", "8", "4", "fp8"])
@pytest.mark.parametrize(("tp_size", "split"), [(1, "tensor"), *((size, each) for size in (2, 4) for each in SPLITS)])
def test_the_planner_counts_the_bytes_that_a_rank_holds(
    random_experts: Checkpoint, quant: Quant, tp_size: int, split: ExpertSplit
) -> None:
    plan = PlacementPlan((Stage(0, 3, tuple(range(tp_size))),))
    held = run_ranks(
        tp_size,
        lambda group: (
            Stages(random_experts, group, [range(3)], quant=quant, expert_split=split).stages[0].weight_bytes()
        ),
    )
    assert max(held) == rank_weight_bytes(random_experts.facts, plan, plan.place_of(0), 4, quant, split)


IDS = [5, 90, 17, 3, 44, 61, 8, 29, 70, 11]


@pytest.mark.parametrize(("quant", "error"), [("8", 0.04), ("fp8", 0.09), ("4", 0.25)])
def test_quantized_experts_stay_near_dense_ones(random_experts: Checkpoint, quant: Quant, error: float) -> None:
    dense = logits_in_chunks(random_experts, IDS, [6, 1, 1, 1, 1])
    quantized = logits_in_chunks(random_experts, IDS, [6, 1, 1, 1, 1], quant=quant)
    assert 0 < (quantized - dense).norm() < error * dense.norm()


@pytest.mark.parametrize("split", SPLITS)
def test_int4_experts_give_the_same_logits_however_they_are_split(
    random_experts: Checkpoint, split: ExpertSplit
) -> None:
    whole = logits_in_chunks(random_experts, IDS, [10], quant="4")
    logits = logits_in_chunks(random_experts, IDS, [10], 2, quant="4", expert_split=split)
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)


def test_dummy_experts_are_reproducible_and_give_finite_logits(random_experts: Checkpoint) -> None:
    def logits(seed: int) -> torch.Tensor:
        def work(group: object) -> torch.Tensor:
            [stage] = Stages(random_experts, group, [range(3)], dummy_seed=seed).stages
            return stage.layers[0].mlp.experts.down.weight.clone()

        return run_ranks(1, work)[0]

    assert torch.isfinite(logits(3)).all()
    assert torch.equal(logits(3), logits(3))
    assert not torch.equal(logits(3), logits(4))
