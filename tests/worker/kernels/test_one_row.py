"""The layers for a single row give what the ordinary layers give, step after step."""

import json
from pathlib import Path

import pytest
import torch

from mgpu.protocol.checkpoint import read_checkpoint
from mgpu.protocol.model import ModelFacts
from mgpu.protocol.placement import RankPlace
from mgpu.protocol.quantization import Quant
from mgpu.worker.batch import StepBatch
from mgpu.worker.collectives import SingleRank
from mgpu.worker.kv_cache import KvCache
from mgpu.worker.layers.one_row import OneRowLayers
from mgpu.worker.models import DecoderStage, build_stage, init_dummy_weights
from mgpu.worker.models.llama import LlamaLayer
from mgpu.worker.reference_attention import ReferenceBackend
from mgpu.worker.triton_attention import TritonBackend

BLOCK = 16
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def make_stage(facts: ModelFacts, quant: Quant, monkeypatch: pytest.MonkeyPatch) -> DecoderStage:
    """Make a stage on the CPU, whose own layers run in plain torch, with weights that kernels can read."""
    place, cpu = RankPlace(0, 0, 0, 1, 0), torch.device("cpu")
    stage = build_stage(facts, place, range(facts.num_layers), SingleRank(), torch.float32, cpu, quant)
    monkeypatch.setattr(stage, "finalize", lambda: None)
    init_dummy_weights(stage, 1)
    for layer in stage.layers:
        assert isinstance(layer, LlamaLayer)
        for norm in (layer.input_norm, layer.mlp_norm):
            norm.weight.uniform_(0.5, 1.5)
    return stage


def one_token(position: int) -> StepBatch:
    where, one = torch.tensor([position]), torch.zeros(1, dtype=torch.int64)
    return StepBatch(
        token_ids=one,
        positions=where,
        slots=where,
        query_starts=torch.tensor([0, 1], dtype=torch.int32),
        context_lens=(where + 1).to(torch.int32),
        block_tables=torch.tensor([[0, 1]], dtype=torch.int32),
        logit_rows=one,
        query_lens_host=[1],
        context_lens_host=[position + 1],
    )


@pytest.mark.parametrize("quant", ["none", "4"])
@torch.inference_mode()
def test_one_row_goes_through_the_layers_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: Quant
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    facts = read_checkpoint(str(tmp_path), "dummy").facts
    stage, cpu = make_stage(facts, quant, monkeypatch), torch.device("cpu")
    caches = [KvCache(2, 2, BLOCK, facts.num_kv_heads, facts.head_dim, torch.float32, cpu) for _ in range(2)]
    layers = [layer for layer in stage.layers if isinstance(layer, LlamaLayer)]
    one_row = OneRowLayers(layers, stage.is_sliding, cpu)
    angles = {kind: stage._rotary[kind].table(64) for kind in (False, True)}
    for position in range(2):
        x = torch.randn(1, facts.hidden_size)
        batch = one_token(position)
        expected = stage.run_layers_with(
            x.clone(), ReferenceBackend().begin_step(batch, BLOCK), batch.positions, caches[0]
        )
        got = one_row.run(x.clone(), angles, TritonBackend().begin_step(batch, BLOCK), caches[1])
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
