"""A tiny GGUF model, written as llama.cpp's converter does, equals the transformers model that it was made from."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from torch import Tensor

from harness.models.tiny_models import TINY, TinyModel
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import read_checkpoint

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Translate a Hugging Face tensor name."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorder q or k rows as the converter does for llama (``permute`` in convert_hf_to_gguf.py)."""
    return rows.view(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model: TinyModel, architecture: str, path: Path, kind: GGMLQuantizationType) -> None:
    """Convert a tiny model; matrices whose rows are whole blocks become ``kind``, other tensors stay float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_context_length(256)
    writer.add_rope_freq_base(10000.0)
    tensors: dict[str, Tensor] = {}
    for file in model.folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = TINY["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = interleave(tensor, heads)
        values = tensor.contiguous().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(("family", "architecture"), [("llama", "llama"), ("qwen2", "qwen2")])
def test_float32_gguf_equals_transformers(
    tiny_model: Callable[[str], TinyModel], tmp_path: Path, family: str, architecture: str, tp_size: int
) -> None:
    model = tiny_model(family)
    write_gguf(model, architecture, tmp_path / "tiny.gguf", GGMLQuantizationType.F32)
    ids = model.prompt_ids + model.output_ids
    logits = logits_in_chunks(read_checkpoint(tmp_path / "tiny.gguf"), ids, [len(ids)], tp_size)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantized_gguf_is_the_same_on_any_number_of_ranks(
    tiny_model: Callable[[str], TinyModel], tmp_path: Path, kind: str
) -> None:
    model = tiny_model("llama")
    write_gguf(model, "llama", tmp_path / "tiny.gguf", GGMLQuantizationType[kind])
    checkpoint = read_checkpoint(tmp_path / "tiny.gguf")
    whole = logits_in_chunks(checkpoint, model.prompt_ids, [24])
    for tp_size in (2, 4):
        torch.testing.assert_close(logits_in_chunks(checkpoint, model.prompt_ids, [24], tp_size), whole)
    if kind == "Q8_0":
        assert (whole - model.logits[:24]).abs().max() < 0.1 * model.logits.abs().max()
