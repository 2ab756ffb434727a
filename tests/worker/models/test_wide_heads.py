"""Layers with heads of two kinds: bytes as planned, in every format, and a cache of two shapes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.models.tiny_models import TinyModel
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import Row, Stages, logits_in_chunks, make_batch
from mgpu.orchestrator.placement.split.sizes import kv_token_bytes, rank_weight_bytes
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.placement import PlacementPlan, Stage, TensorPart, padded_vocab
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.state.kv_cache import block_bytes

MakeModel = Callable[[str], TinyModel]


@pytest.mark.parametrize("quant", ["none", "8"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_planner_counts_the_bytes_that_a_rank_holds(tiny_model: MakeModel, tp_size: int, quant: Quant) -> None:
    checkpoint = read_checkpoint(tiny_model("gemma4").folder)
    halves, ranks = [range(2), range(2, 4)], tuple(range(tp_size))
    facts, plan = checkpoint.facts, PlacementPlan((Stage(0, 2, ranks), Stage(2, 4, ranks)))

    def work(group: ThreadGroup) -> tuple[list[int], int]:
        stages = Stages(checkpoint, group, halves, quant=quant)
        layers = [layer for cache in stages.caches for layer in cache.layers]
        held = sum(layer.k_NBJK[0].nbytes + layer.v_NBJK[0].nbytes for layer in layers)
        return [stage.weight_bytes() for stage in stages.stages], held

    held = run_ranks(tp_size, work)
    weights, block = [max(sizes) for sizes in zip(*(each[0] for each in held), strict=True)], held[0][1]
    places = plan.place_of(0), plan.place_of(tp_size)
    assert weights == [rank_weight_bytes(facts, plan, place, 4, quant) for place in places]
    assert block == 4 * kv_token_bytes(facts, range(4), tp_size, 4)
    assert block == block_bytes(facts, range(4), TensorPart(0, tp_size), 4, torch.float32)


def logits_of_rows(model: TinyModel) -> tuple[Tensor, Tensor]:
    """Return the logits of mixed rows, and of rows that decode together."""

    def work(group: ThreadGroup) -> tuple[Tensor, Tensor]:
        stages, ids = Stages(read_checkpoint(model.folder), group, [range(6)]), model.prompt_ids
        rows = [Row([9, 2, 11, 4, 30, 6, 17, 8]), Row([1, 0, 3, 5]), Row([7, 10, 12, 13, 14, 15, 16, 18])]
        stages.step(make_batch([(rows[0], ids[:20]), (rows[1], ids[:3])], 4))
        mixed = stages.step(make_batch([(rows[1], ids[3:4]), (rows[2], ids[:11]), (rows[0], ids[20:21])], 4))
        return mixed, stages.step(make_batch([(rows[2], ids[11:12]), (rows[0], ids[21:22]), (rows[1], ids[4:5])], 4))

    return run_ranks(1, work)[0]


@pytest.mark.parametrize(("tp_size", "chunks"), [(1, [9, 1, 22]), (2, [24, *[1] * 8]), (4, [5, 6, 1, 1, 13, 6])])
def test_layers_read_the_caches_of_others_and_have_inputs_of_their_own(
    tiny_model: MakeModel, tp_size: int, chunks: list[int]
) -> None:
    model = tiny_model("gemma4-small")
    checkpoint = read_checkpoint(model.folder)
    assert checkpoint.facts.cache_sources == (0, 1, 2, 2, 2, 0)
    ids = model.prompt_ids + model.output_ids
    logits = logits_in_chunks(checkpoint, ids, chunks, tp_size)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)
    assert logits[len(model.prompt_ids) - 1 : -1].argmax(-1).tolist() == model.output_ids


def test_rows_that_share_caches_do_not_see_each_other(tiny_model: MakeModel) -> None:
    model = tiny_model("gemma4-small")
    mixed, decode = logits_of_rows(model)
    torch.testing.assert_close(mixed, model.logits[[3, 10, 20]], atol=1e-4, rtol=0)
    torch.testing.assert_close(decode, model.logits[[11, 21, 4]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_layers_that_share_a_cache_hold_none(tiny_model: MakeModel, tp_size: int) -> None:
    checkpoint = read_checkpoint(tiny_model("gemma4-small").folder)
    facts, plan = checkpoint.facts, PlacementPlan((Stage(0, 6, tuple(range(tp_size))),))

    def work(group: ThreadGroup) -> tuple[int, int]:
        stages = Stages(checkpoint, group, [range(6)])
        layers = {id(layer): layer for layer in stages.caches[0].layers}.values()
        held = sum(layer.k_NBJK[0].nbytes + layer.v_NBJK[0].nbytes for layer in layers)
        return stages.stages[0].weight_bytes(), held

    held = run_ranks(tp_size, work)
    head = 4 * padded_vocab(101, tp_size) // tp_size * 64
    counted = rank_weight_bytes(facts, plan, plan.place_of(0), 4)
    assert max(each[0] for each in held) in (counted, counted + head)  # a CPU may keep a tied head a second time
    assert held[0][1] == 4 * kv_token_bytes(facts, range(6), tp_size, 4)
    assert held[0][1] == block_bytes(facts, range(6), TensorPart(0, tp_size), 4, torch.float32)


def test_keys_that_no_layer_computes_may_be_stored(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("gemma4-small").folder, tmp_path / "model"))
    more = {f"model.layers.4.self_attn.{part}.weight": torch.zeros(2, 2) for part in ("k_proj", "v_proj", "k_norm")}
    save_file(more, folder / "more.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(more, "more.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not set(more) & set(read_checkpoint(folder).tensors)


def test_dummy_weights_give_finite_logits(tiny_model: MakeModel) -> None:
    checkpoint = read_checkpoint(tiny_model("gemma4-small").folder)

    def work(group: ThreadGroup) -> Tensor:
        stages = Stages(checkpoint, group, [range(6)], dummy_seed=3)
        return stages.step(make_batch([(Row([3, 4]), [5, 6, 7, 8, 9])], 4))

    assert torch.isfinite(run_ranks(2, work)[0]).all()


def test_quantized_weights_stay_near_dense_ones(tiny_model: MakeModel) -> None:
    model = tiny_model("gemma4")
    logits = logits_in_chunks(read_checkpoint(model.folder), model.prompt_ids, [20, 1, 3], quant="8")
    assert (logits - model.logits[:24]).abs().mean() < 0.05 * model.logits.std()


def test_bfloat16_stays_near_float32(tiny_model: MakeModel) -> None:
    model = tiny_model("gemma4")
    logits = logits_in_chunks(read_checkpoint(model.folder), model.prompt_ids, [10, 1, 13], 2, dtype=torch.bfloat16)
    assert (logits - model.logits[:24]).abs().mean() < 0.05 * model.logits.std()
