"""Tiny models with linear attention equal transformers, on every layout and however a prompt is cut."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.models.quantized_folders import float8_blocks
from harness.models.tiny_configs import HYBRID_MODELS
from harness.models.tiny_models import TinyModel
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import Row, Stages, logits_in_chunks, make_batch
from mgpu.orchestrator.placement.split.sizes import rank_weight_bytes, state_bytes
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.placement import PlacementPlan, Stage

MakeModel = Callable[[str], TinyModel]


@pytest.mark.parametrize(("tp_size", "num_stages"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("family", HYBRID_MODELS)
def test_prefill_and_decode_equal_transformers(
    tiny_model: MakeModel, family: str, tp_size: int, num_stages: int
) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    chunks = [len(model.prompt_ids)] + [1] * len(model.output_ids)
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, chunks, tp_size, num_stages)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)
    assert logits[len(model.prompt_ids) - 1 : -1].argmax(-1).tolist() == model.output_ids


@pytest.fixture(scope="module")
def long_prompt(tiny_model: MakeModel) -> tuple[list[int], Tensor]:
    """A prompt longer than two chunks of the rule, and the logits of transformers."""
    import transformers as hf

    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_model("qwen3-next").folder, **ways)
    ids = torch.randint(3, 101, (128,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        return ids, model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    "chunks", [[128], [63, 1, 1, 63], [64, 64], [70, 1, 54, 1, 2]], ids=lambda chunks: "-".join(map(str, chunks))
)
def test_prompts_are_cut_across_chunks_and_blocks(
    tiny_model: MakeModel, long_prompt: tuple[list[int], Tensor], chunks: list[int]
) -> None:
    ids, expected = long_prompt
    logits = logits_in_chunks(read_checkpoint(tiny_model("qwen3-next").folder), ids, chunks)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_rows_of_a_mixed_step_have_states_of_their_own_and_new_owners_none(tiny_model: MakeModel) -> None:
    model = tiny_model("qwen3.5")
    ids = model.prompt_ids + model.output_ids

    def work(group: ThreadGroup) -> list[Tensor]:
        stages = Stages(read_checkpoint(model.folder), group, [range(3)])
        rows = [Row([9, 2, 11, 4, 30, 6, 17, 8]), Row([1, 0, 3, 5]), Row([7, 10, 12, 13, 14, 15, 16, 18])]
        stages.step(make_batch([(rows[0], ids[:20]), (rows[1], ids[:3])], stages.block_size))
        mixed = stages.step(make_batch([(rows[1], ids[3:4]), (rows[2], ids[:11]), (rows[0], ids[20:21])], 4))
        decode = stages.step(make_batch([(rows[2], ids[11:12]), (rows[0], ids[21:22]), (rows[1], ids[4:5])], 4))
        heirs = Row([1, 0, 3, 5]), Row([9, 2, 11, 4])  # of the second row and the first
        first = stages.step(make_batch([(heirs[0], ids[:1]), (rows[2], ids[12:13]), (heirs[1], ids[:2])], 4))
        return [mixed, decode, first]

    mixed, decode, first = run_ranks(1, work)[0]
    torch.testing.assert_close(mixed, model.logits[[3, 10, 20]], atol=1e-4, rtol=0)
    torch.testing.assert_close(decode, model.logits[[11, 21, 4]], atol=1e-4, rtol=0)
    torch.testing.assert_close(first, model.logits[[0, 12, 1]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("quant", ["none", "8"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_planner_counts_the_bytes_that_a_rank_holds(tiny_model: MakeModel, tp_size: int, quant: str) -> None:
    checkpoint = read_checkpoint(tiny_model("qwen3-next").folder)
    facts, plan = checkpoint.facts, PlacementPlan((Stage(0, 3, tuple(range(tp_size))),))

    def work(group: ThreadGroup) -> tuple[int, int]:
        stages = Stages(checkpoint, group, [range(3)], quant=quant)
        states = [layer.states for layer in stages.caches[0].layers if layer.states is not None]
        held = sum(each.state_NHKV[0].nbytes + each.tail_NWC[0].nbytes for each in states)
        return stages.stages[0].weight_bytes(), held

    weights, states = (max(each) for each in zip(*run_ranks(tp_size, work), strict=True))
    assert weights == rank_weight_bytes(facts, plan, plan.place_of(0), 4, quant)
    assert states == state_bytes(facts, range(3), tp_size, 4)


def test_quantized_weights_stay_near_dense_ones(tiny_model: MakeModel) -> None:
    model = tiny_model("qwen3.5-moe")
    logits = logits_in_chunks(read_checkpoint(model.folder), model.prompt_ids, [20, 1, 3], quant="8")
    assert (logits - model.logits[:24]).abs().mean() < 0.05 * model.logits.std()


def test_bfloat16_stays_near_float32(tiny_model: MakeModel) -> None:
    model = tiny_model("qwen3.5")
    logits = logits_in_chunks(read_checkpoint(model.folder), model.prompt_ids, [10, 1, 13], 2, dtype=torch.bfloat16)
    assert (logits - model.logits[:24]).abs().mean() < 0.05 * model.logits.std()


def test_dummy_weights_give_finite_logits(tiny_model: MakeModel) -> None:
    checkpoint = read_checkpoint(tiny_model("qwen3.5").folder)

    def work(group: ThreadGroup) -> Tensor:
        stages = Stages(checkpoint, group, [range(3)], dummy_seed=3)
        return stages.step(make_batch([(Row([3, 4]), [5, 6, 7, 8, 9])], 4))

    assert torch.isfinite(run_ranks(2, work)[0]).all()


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3-next"])
def test_quantized_projections_stay_packed(tiny_model: MakeModel, tmp_path: Path, family: str) -> None:
    """FP8 in blocks of 16, of everything but what gates and fades the states."""
    source, generator = tiny_model(family).folder, torch.Generator().manual_seed(0)
    stored, dense = {}, {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            stored[name] = dense[name] = tensor
            is_matrix = tensor.dim() == 2 and ".layers." in name and tensor.shape[0] % 16 == tensor.shape[1] % 16 == 0
            if is_matrix and "in_proj_b" not in name and "in_proj_a" not in name and not name.endswith("gate.weight"):
                parts, dense[name] = float8_blocks(16)(generator, *tensor.shape)
                del stored[name]
                stored |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    config = json.loads((source / "config.json").read_text())
    scheme = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    logits = []
    for tensors, more in ((dense, {}), (stored, {"quantization_config": scheme})):
        folder = tmp_path / str(len(logits))
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | more))
        logits += [logits_in_chunks(read_checkpoint(folder), list(range(3, 20)), [15, 1, 1], size) for size in (1, 2)]
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0], atol=1e-4 * float(logits[0].abs().max()), rtol=0)
    formats = read_checkpoint(folder).facts.formats
    assert {form.qkv.quant for form in formats} == {form.out.quant for form in formats} == {"fp8"}
