"""Families that run through transformers' own code equal transformers, on every layout."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.models.families import BORROWED
from harness.models.tiny_models import TinyModel
from harness.ranks.stage_driver import Row, logits_in_chunks, make_batch
from mgpu.protocol.checkpoint.huggingface.borrowed import UNSPLIT
from mgpu.protocol.checkpoint.read import CheckpointError, read_checkpoint
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.models.borrowed_attention import CurrentStep, LayerPlace, attend
from mgpu.worker.models.borrowed_experts import activation_of
from mgpu.worker.models.borrowed_norms import unit_offset_of
from mgpu.worker.models.build import build_stage, init_dummy_weights
from mgpu.worker.ranks.collectives import MeasurableGroup, SingleRank
from mgpu.worker.state.kv_cache import KvCache

MakeModel = Callable[[str], TinyModel]
LAYOUTS = [(family, 1, 1) for family in ("cohere", "stablelm", "starcoder2")]
LAYOUTS += [(family, 1 if family in UNSPLIT else 2, 2) for family in BORROWED]
LAYOUTS += [(family, 4, 1) for family in ("cohere2", "glm4", "phi")]


@pytest.mark.parametrize(("family", "tp_size", "stages"), LAYOUTS)
def test_a_borrowed_family_equals_transformers(tiny_model: MakeModel, family: str, tp_size: int, stages: int) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    chunks = [9, len(model.prompt_ids) - 9] + [1] * len(model.output_ids)
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, chunks, tp_size, stages)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)
    assert logits[len(model.prompt_ids) - 1 : -1].argmax(-1).tolist() == model.output_ids


@pytest.mark.parametrize(
    ("family", "tp_size", "split"),
    [("dots1", 4, "parallel"), ("hunyuan_v1_moe", 4, "tensor"), ("ernie4_5_moe", 2, "parallel"),
     ("olmoe", 1, "tensor")],
)  # fmt: skip
def test_borrowed_experts_are_split_both_ways(
    tiny_model: MakeModel, family: str, tp_size: int, split: ExpertSplit
) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, [9, len(ids) - 9], tp_size, expert_split=split)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3"])
def test_transformers_code_runs_own_families_too(tiny_model: MakeModel, family: str) -> None:
    name = "mistral-window" if family == "mistral" else family
    model = tiny_model(name)
    ids = model.prompt_ids + model.output_ids
    checkpoint = read_checkpoint(model.folder, code="transformers")
    assert checkpoint.facts.borrowed is not None
    logits = logits_in_chunks(checkpoint, ids, [9, len(ids) - 9], 2, 2)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)


def test_attention_that_transformers_cannot_split_is_refused(tiny_model: MakeModel) -> None:
    checkpoint = read_checkpoint(tiny_model("stablelm").folder)
    with pytest.raises(CheckpointError, match="no plan to split the attention of stablelm over 2 ranks"):
        logits_in_chunks(checkpoint, [3], [1], tp_size=2)


def test_random_weights_fill_whole_models_and_parts_of_them(tiny_model: MakeModel) -> None:
    folder, place, group = tiny_model("dots1").folder, RankPlace(0, 0, 0, 1, 0), MeasurableGroup(SingleRank())
    facts = read_checkpoint(folder, "dummy").facts
    for part in (facts, facts.with_layers([0])):
        layers = range(part.num_layers)
        stage = build_stage(part, place, layers, group, torch.float32, torch.device("cpu"), folder=str(folder))
        init_dummy_weights(stage, 0)
        batch = make_batch([(Row([0]), [3, 5, 7])], 16)
        cache = KvCache(part.num_layers, 1, 16, part.num_kv_heads, part.head_dim, torch.float32, torch.device("cpu"))
        with torch.inference_mode():
            x_TD = stage.run_layers(stage.embed(batch.token_ids), batch, cache)
            assert stage.logits(x_TD)[:, : facts.vocab_size].isfinite().all()


def test_norms_are_told_apart_by_what_they_compute() -> None:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with torch.device("meta"):
        kinds = LlamaRMSNorm(8), GemmaRMSNorm(8), CohereLayerNorm(8), nn.LayerNorm(8, bias=False), nn.Linear(8, 8)
    assert [unit_offset_of(each) for each in kinds] == [False, True, None, None, None]


def test_experts_are_told_apart_by_what_they_compute() -> None:
    def kind(activation: Callable[[Tensor], Tensor], **flags: bool) -> Any:
        def gated(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=-1)
            return activation(gate) * up

        return SimpleNamespace(_apply_gate=gated, has_gate=True, has_bias=False, **flags)

    assert activation_of(kind(nn.functional.silu)) == "silu"
    assert activation_of(kind(nn.GELU("tanh"))) == "gelu_tanh"
    assert activation_of(kind(nn.functional.relu)) is None
    assert activation_of(kind(nn.functional.silu, is_transposed=True)) is None


def test_kernels_of_attention_get_packed_heads_that_they_turn_by_no_angle() -> None:
    """The library has rotated them."""
    query, key, value = (torch.randn(1, heads, 3, 16) for heads in (4, 2, 2))
    given: list[Any] = []

    def attend_packed(*arguments: Any) -> Tensor:
        given.extend(arguments)
        return torch.ones(3, 4, 16)

    packed: Any = SimpleNamespace(packed=SimpleNamespace(attend_packed=attend_packed))
    step, module = CurrentStep(range(1)), nn.Module()
    module.mgpu_layer = LayerPlace(step, 0)
    cache = KvCache(1, 2, 16, 2, 16, torch.float32, torch.device("cpu"))
    with step.running(packed, cache, 32):
        out, _ = attend(module, query, key, value, None, scaling=0.5, sliding_window=9)
    assert out.shape == (1, 3, 4, 16)
    qkv_TAK, scale_T, table_PK, layer, spec = given
    assert torch.equal(qkv_TAK, torch.cat([query, key, value], dim=1)[0].transpose(0, 1))
    assert scale_T is None
    assert table_PK.shape == (32, 16)
    assert table_PK[:, :8].unique().tolist() == [1.0]
    assert table_PK[:, 8:].unique().tolist() == [0.0]
    assert layer is cache.layers[0]
    assert (spec.scale, spec.window) == (0.5, 9)
