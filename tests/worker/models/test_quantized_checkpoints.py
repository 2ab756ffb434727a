"""Models of quantized checkpoints are held packed, formats are mixed, and broken numbers are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.models.quantized_folders import FORMATS, LATENTS, Store, write_quantized
from harness.models.random_model import write_random_model
from harness.models.stored_models import FOLDERS
from harness.ranks.rank_threads import run_ranks
from harness.ranks.stage_driver import Stages, logits_in_chunks
from harness.servers.fake_orchestrator import running
from harness.specs import make_spec
from mgpu.orchestrator.placement.split.sizes import rank_weight_bytes
from mgpu.protocol.checkpoint.read import CheckpointError, read_checkpoint
from mgpu.protocol.model.placement import PlacementPlan, Stage

IDS = [5, 90, 17, 3, 44, 61, 8, 29, 70, 11]
Make = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make the quantized and the dense folder of a format; each once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = write_quantized(tmp_path_factory.mktemp(name), FORMATS[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-blocks", "int8-zeros", "w4a16", "gptq-order", "gptq-8-groups"])
def test_the_planner_counts_the_bytes_that_are_held_packed(folders: Make, name: str) -> None:
    checkpoint = read_checkpoint(folders(name)[0])
    plan = PlacementPlan((Stage(0, 2, (0, 1)),))
    held = run_ranks(2, lambda group: Stages(checkpoint, group, [range(2)]).stages[0].weight_bytes())
    assert held == [rank_weight_bytes(checkpoint.facts, plan, plan.place_of(rank), 4) for rank in range(2)]
    assert held[0] < 0.5 * rank_weight_bytes(read_checkpoint(folders(name)[1]).facts, plan, plan.place_of(0), 4)


def test_worker_processes_generate_the_tokens_of_the_dequantized_model(folders: Make, tmp_path: Path) -> None:
    quantized, dense = folders("gptq-order")
    with running(make_spec(quantized, [2]), tmp_path) as workers:
        workers.make_ready()
        tokens = workers.generate(IDS, 3)
        workers.shut_down()
    expected = list(IDS)
    for _ in range(3):
        expected.append(int(logits_in_chunks(read_checkpoint(dense), expected, [len(expected)])[-1].argmax()))
    assert tokens == expected[len(IDS) :]


def logits_of_both(folders: tuple[Path, Path], tp_size: int = 1) -> tuple[Tensor, Tensor]:
    """Return the logits of the quantized folder and of the dense one."""
    quantized, dense = (logits_in_chunks(read_checkpoint(folder), IDS, [10], tp_size) for folder in folders)
    return quantized, dense


def test_matrices_of_several_formats_are_each_held_as_they_are(tmp_path: Path) -> None:
    eight = {"num_bits": 8, "type": "int", "strategy": "channel"}
    groups = {
        "a": {"targets": ["re:.*down_proj$"], "weights": eight, "format": "int-quantized"},
        "b": {"targets": ["Linear"], "weights": FORMATS["w4a16"].config["config_groups"]["group_0"]["weights"]},
    }
    how = replace(FORMATS["w4a16"], config={**FORMATS["w4a16"].config, "config_groups": groups})

    def stores(name: str) -> Store | None:
        if name == "model.layers.1.self_attn.k_proj.weight" or "layers.0.mlp.gate" in name:
            return None
        return FORMATS["int8-channel"].store if "down_proj" in name else how.store

    folders = write_quantized(tmp_path, how, stores)
    logits, expected = logits_of_both(folders, 2)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    first, last = read_checkpoint(folders[0]).facts.formats
    assert (first.qkv.quant, first.down.quant, first.gate_up.quant) == ("4", "8", "none")
    assert (last.qkv.quant, last.out.quant, last.gate_up.quant) == ("none", "4", "4")  # k alone is not quantized


def test_scales_of_fp8_blocks_are_held_as_products_take_them(folders: Make) -> None:
    """Qwen publishes them in bfloat16, DeepSeek in float32; a product on GPUs takes float32 alone."""
    checkpoint = read_checkpoint(folders("fp8-blocks")[0])
    [modules] = run_ranks(1, lambda group: Stages(checkpoint, group, [range(2)]).stages[0].named_modules())
    held = [packed for _, module in modules if (packed := getattr(module, "packed", None)) is not None]
    assert len(held) == 8
    assert {packed.scales.dtype for packed in held} == {torch.float32}


@pytest.mark.parametrize("name", ["fp8-blocks", "fp8-channel", "gptq-order", "awq"])
def test_the_planner_counts_the_bytes_of_packed_experts(tmp_path: Path, name: str) -> None:
    checkpoint = FOLDERS[f"{name} experts"](tmp_path).packed
    plan = PlacementPlan((Stage(0, 2, (0,)),))
    [held] = run_ranks(1, lambda group: Stages(checkpoint, group, [range(2)]).stages[0].weight_bytes())
    assert held == rank_weight_bytes(checkpoint.facts, plan, plan.place_of(0), 4)


@pytest.mark.parametrize("name", ["fp8-blocks", "gptq-order", "w4a16-zeros"])
def test_stacked_matrices_with_partly_rotated_heads_stay_packed(tmp_path: Path, name: str) -> None:
    changes = {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75}
    quantized, dense = write_quantized(tmp_path, FORMATS[name], **changes, stacked=True)
    logits, expected = logits_of_both((quantized, dense), 2)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert read_checkpoint(quantized).facts.formats[0].qkv.source


@pytest.mark.parametrize(("name", "query_rank"), [("fp8-blocks", 64), ("fp8-blocks", None), ("gptq-order", 64)])
def test_projections_of_latents_stay_packed_but_for_those_of_heads(
    tmp_path: Path, name: str, query_rank: int | None
) -> None:
    changes = LATENTS | {"q_lora_rank": query_rank}
    folders = write_quantized(tmp_path, FORMATS[name], **changes)
    checkpoint = read_checkpoint(folders[0])
    for tp_size in (1, 4):
        logits, expected = logits_of_both(folders, tp_size)
        torch.testing.assert_close(logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
        plan = PlacementPlan((Stage(0, 2, tuple(range(tp_size))),))
        held = run_ranks(tp_size, lambda group: Stages(checkpoint, group, [range(2)]).stages[0].weight_bytes())
        assert held[0] == rank_weight_bytes(checkpoint.facts, plan, plan.place_of(0), 4)
    form = checkpoint.facts.formats[1]
    assert form.qkv.source == form.out.source == form.gate_up.source != ""
    assert bool(form.q_b.source) == (query_rank is not None)


@pytest.mark.parametrize(
    ("types", "error"), [({"kv_cache_dtype": "fp8"}, 0.04), ({"quant": "8"}, 0.02), ({"quant": "4"}, 0.2)], ids=str
)
def test_latents_in_fewer_bits_stay_near(tmp_path: Path, types: dict[str, object], error: float) -> None:
    checkpoint = read_checkpoint(write_random_model(tmp_path, **LATENTS))
    expected = logits_in_chunks(checkpoint, IDS, [6, 1, 3])
    logits = logits_in_chunks(checkpoint, IDS, [6, 1, 3], 2, **types)
    assert 0 < float((logits - expected).abs().mean() / expected.std()) < error


def test_a_quantized_head_is_dequantized_and_quant_quantizes_anew(tmp_path: Path) -> None:
    def stores(name: str) -> Store:
        return FORMATS["gptq"].store

    folders = write_quantized(tmp_path, FORMATS["gptq"], stores, also=("lm_head.weight",), vocab_size=128)
    logits, expected = logits_of_both(folders, 2)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    anew, dense = (logits_in_chunks(read_checkpoint(folder), IDS, [10], quant="8") for folder in folders)
    torch.testing.assert_close(anew, dense, atol=1e-4, rtol=0)


Spoil = Callable[[dict[str, Tensor]], None]
DOWN = "model.layers.1.mlp.down_proj."


def put(end: str, value: float) -> Spoil:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN + end].view(-1)[-1] = value

    return spoil


def put_nan_octet(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + "weight"].view(torch.uint8)[3, 5] = 0x7F


@pytest.mark.parametrize(("name", "spoil", "end", "said"), [
    ("fp8-blocks", put("weight_scale_inv", float("nan")), "weight_scale_inv", "holds NaN or infinity"),
    ("w4a16", put("weight_scale", float("inf")), "weight_scale", "holds NaN or infinity"),
    ("awq", put("scales", float("nan")), "scales", "holds NaN or infinity"),
    ("fp8-tensor", put_nan_octet, "weight", "holds NaN"),
    ("gptq-order", put("g_idx", 8), "g_idx", "names groups outside of the 8 that there are"),
    ("gptq-order", put("g_idx", -1), "g_idx", "names groups outside of the 8 that there are"),
    ("gptq", put("g_idx", 0), "g_idx", "puts inputs into groups out of order"),
])  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused_with_tensor_and_file(
    folders: Make, tmp_path: Path, name: str, spoil: Spoil, end: str, said: str
) -> None:
    source = folders(name)[0]
    tensors = load_file(source / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        run_ranks(1, lambda group: Stages(read_checkpoint(tmp_path), group, [range(2)]))
    assert said in str(caught.value)
    assert f"{DOWN}{end}" in str(caught.value)
    assert "model.safetensors" in str(caught.value)
