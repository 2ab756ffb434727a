"""Tiny models of every family equal transformers, on every layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.models.families import BORROWED, DENSE, EVERY
from harness.models.tiny_configs import tiny_config
from harness.models.tiny_models import TinyModel
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import Row, Stages, logits_in_chunks, make_batch
from mgpu.protocol.checkpoint.huggingface.families import MODEL_TYPES
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.worker.models.build import DecoderStage

MakeModel = Callable[[str], TinyModel]


def test_every_family_that_is_served_has_a_tiny_model() -> None:
    made = {tiny_config(family).model_type for family in EVERY}
    # The text part of a folder that is made whole, a folder whose text part is made, and DeepSeek V3 by another name.
    others = {"qwen2_5_vl_text", "llama4", "kimi_k2"}
    assert {*MODEL_TYPES, *BORROWED} - others <= made


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", DENSE)
def test_prefill_and_decode_equal_transformers(tiny_model: MakeModel, family: str, tp_size: int) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    chunks = [len(model.prompt_ids)] + [1] * len(model.output_ids)
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, chunks, tp_size)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)
    assert logits[len(model.prompt_ids) - 1 : -1].argmax(-1).tolist() == model.output_ids


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", DENSE)
def test_stages_of_uneven_layers_equal_transformers(tiny_model: MakeModel, family: str, tp_size: int) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, [len(ids)], tp_size, num_stages=2)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[32], [5, 6, 1, 1, 13, 6], [1] * 32], ids=["whole", "mixed", "single"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3", "gemma4", "deepseek-v3"])
def test_any_chunking_gives_the_same_logits(tiny_model: MakeModel, family: str, chunks: list[int]) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, chunks)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma4", "deepseek-v3"])
def test_rows_of_a_mixed_batch_do_not_see_each_other(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids

    def work(group: ThreadGroup) -> tuple[Tensor, Tensor]:
        layers = read_checkpoint(model.folder).facts.num_layers
        stages = Stages(read_checkpoint(model.folder), group, [range(layers)])
        rows = [Row([9, 2, 11, 4, 30, 6, 17, 8]), Row([1, 0, 3, 5]), Row([7, 10, 12, 13, 14, 15, 16, 18])]
        stages.step(make_batch([(rows[0], ids[:20]), (rows[1], ids[:3])], stages.block_size))
        mixed = stages.step(make_batch([(rows[1], ids[3:4]), (rows[2], ids[:11]), (rows[0], ids[20:21])], 4))
        decode = stages.step(make_batch([(rows[2], ids[11:12]), (rows[0], ids[21:22]), (rows[1], ids[4:5])], 4))
        return mixed, decode

    mixed, decode = run_ranks(1, work)[0]
    torch.testing.assert_close(mixed, model.logits[[3, 10, 20]], atol=1e-4, rtol=0)
    torch.testing.assert_close(decode, model.logits[[11, 21, 4]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_mlp_width_that_does_not_divide_is_split_unevenly(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family)
    assert read_checkpoint(model.folder).facts.intermediate_size % 4 == 2
    ids = model.prompt_ids
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, [len(ids)], tp_size=4)
    torch.testing.assert_close(logits, model.logits[: len(ids)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_bfloat16_stays_near_float32(tiny_model: MakeModel, tp_size: int) -> None:
    model = tiny_model("gemma3")
    ids = model.prompt_ids
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, [10, 1, 13], tp_size, dtype=torch.bfloat16)
    assert logits.dtype == torch.float32
    spread = model.logits.std()
    assert (logits - model.logits[: len(ids)]).abs().mean() < 0.05 * spread


def test_ranks_read_their_own_bytes_only(tiny_model: MakeModel) -> None:
    checkpoint = read_checkpoint(tiny_model("llama").folder)
    stored = sum(entry.nbytes for entry in checkpoint.tensors.values())
    norms = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if name.endswith("norm.weight"))
    layers = [range(checkpoint.facts.num_layers)]
    read = run_ranks(2, lambda group: Stages(checkpoint, group, layers).bytes_read)
    assert sum(read) == stored + norms


def test_tied_embedding_is_held_once_when_the_stage_has_both_ends(tiny_model: MakeModel) -> None:
    checkpoint = read_checkpoint(tiny_model("qwen2").folder)

    def work(group: ThreadGroup) -> tuple[DecoderStage, ...]:
        return (
            *Stages(checkpoint, group, [range(3)]).stages,
            *Stages(checkpoint, group, [range(1), range(1, 3)]).stages,
        )

    whole, first, last = run_ranks(1, work)[0]
    assert whole.head is whole.embedding
    assert first.head is None
    assert last.embedding is None
    assert last.head is not None
    x_SD = torch.randn(3, 64)
    torch.testing.assert_close(last.head.logits(x_SD), whole.head.logits(x_SD))
    matrix_bytes = 4 * 101 * 64
    layers_bytes = 3 * 4 * (64 * (64 + 2 * 32) + 64 + 2 * 32 + 64 * 64 + 3 * 64 * 94 + 2 * 64)
    assert whole.weight_bytes() <= layers_bytes + 4 * 64 + 2 * matrix_bytes
    assert first.weight_bytes() + last.weight_bytes() == layers_bytes + 4 * 64 + 2 * matrix_bytes


def test_dummy_weights_are_reproducible_and_give_finite_logits(tiny_model: MakeModel) -> None:
    checkpoint = read_checkpoint(tiny_model("qwen3").folder)

    def work(group: ThreadGroup) -> list[Tensor]:
        stages = (
            Stages(checkpoint, group, [range(3)], dummy_seed=3),
            Stages(checkpoint, group, [range(3)], dummy_seed=3),
        )
        other = Stages(checkpoint, group, [range(3)], dummy_seed=4)
        return [each.step(make_batch([(Row([3, 4]), [5, 6, 7, 8, 9])], 4)) for each in (*stages, other)]

    one, same, other = run_ranks(2, work)[0]
    assert torch.isfinite(one).all()
    assert 0.01 < one.std() < 100
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
