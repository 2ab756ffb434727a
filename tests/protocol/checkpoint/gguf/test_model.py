"""GGUF models: facts from metadata and tensors, Hugging Face names, models in parts."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.models.model_files import (
    LLAMA_METADATA,
    GgufValue,
    bool_array,
    f32,
    gguf_bytes,
    llama_gguf_tensors,
    string,
    u32,
)
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, expected_tensors, read_checkpoint


def read(folder: Path, metadata: Mapping[str, GgufValue | None] = {}) -> Checkpoint:
    """Read the tiny llama with changed metadata (None removes a key)."""
    merged = {key: value for key, value in {**LLAMA_METADATA, **metadata}.items() if value is not None}
    path = folder / "model.gguf"
    path.write_bytes(gguf_bytes(merged, llama_gguf_tensors()))
    return read_checkpoint(path)


def gemma(folder: Path, changes: Mapping[str, GgufValue] = {}) -> Checkpoint:
    metadata = {key.replace("llama.", "gemma3."): value for key, value in LLAMA_METADATA.items()}
    metadata |= {"general.architecture": string("gemma3"), "gemma3.attention.sliding_window": u32(32), **changes}
    tensors = llama_gguf_tensors(qk_norm=True)
    for layer in range(2):
        for name in ("post_attention_norm", "post_ffw_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = ((64,), 0, bytes(256))
    path = folder / "model.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors))
    return read_checkpoint(path)


def test_a_llama_file_gives_facts_and_hugging_face_names(tmp_path: Path) -> None:
    checkpoint = read(tmp_path)
    facts = checkpoint.facts
    assert (facts.architecture, facts.hidden_size, facts.num_layers, facts.vocab_size) == ("llama", 64, 2, 100)
    assert (facts.num_q_heads, facts.num_kv_heads, facts.head_dim) == (4, 2, 16)
    assert (facts.tie_embeddings, facts.qkv_bias, facts.qk_norm) == (True, False, False)
    assert (facts.bos_token_id, facts.eos_token_ids, facts.max_position) == (1, (2,), 256)
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == expected_tensors(facts)
    assert checkpoint.source.format == "gguf"


def test_an_output_tensor_means_untied_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = llama_gguf_tensors() | {"output.weight": ((100, 64), 0, bytes(25600))}
    path.write_bytes(gguf_bytes(LLAMA_METADATA, tensors))
    checkpoint = read_checkpoint(path)
    assert not checkpoint.facts.tie_embeddings
    assert checkpoint.tensors["lm_head.weight"].shape == (100, 64)


def test_stop_tokens_of_all_kinds(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.eot_token_id": u32(9), "tokenizer.ggml.eom_token_id": u32(2)}
    assert read(tmp_path, changes).facts.eos_token_ids == (2, 9)


def test_gemma_facts(tmp_path: Path) -> None:
    facts = gemma(tmp_path).facts
    assert (facts.architecture, facts.activation, facts.embedding_scale) == ("gemma3", "gelu_tanh", 8.0)
    assert (facts.rope_local_theta, facts.qk_norm, facts.sliding_window) == (1e4, True, 32)
    assert facts.sliding_layers == (True, True)  # every sixth layer sees everything; there are two


@pytest.mark.parametrize("pattern", [u32(2), bool_array([True, False])])
def test_the_sliding_pattern_may_be_stored(tmp_path: Path, pattern: GgufValue) -> None:
    assert gemma(tmp_path, {"gemma3.attention.sliding_window_pattern": pattern}).facts.sliding_layers == (True, False)


def test_gemma_norms_get_their_places(tmp_path: Path) -> None:
    checkpoint = gemma(tmp_path)
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == expected_tensors(checkpoint.facts)


@pytest.mark.parametrize("architecture", ["gpt2", "rwkv7", ""])
def test_unsupported_architectures_list_the_supported_ones(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(CheckpointError, match="llama, qwen2, qwen3, gemma3"):
        read(tmp_path, {"general.architecture": string(architecture)})


@pytest.mark.parametrize(("key", "value"), [
    ("general.architecture", None),
    ("general.architecture", u32(1)),
    ("llama.block_count", None),
    ("llama.block_count", u32(0)),
    ("llama.block_count", u32(1 << 31)),
    ("llama.embedding_length", u32(0)),
    ("llama.embedding_length", string("64")),
    ("llama.attention.head_count", u32(3)),
    ("llama.attention.head_count_kv", u32(3)),
    ("llama.attention.head_count_kv", bool_array([True, True])),
    ("llama.attention.value_length", u32(8)),
    ("llama.rope.dimension_count", u32(8)),
    ("llama.rope.freq_base", f32(float("nan"))),
    ("llama.rope.scaling.type", string("xpos")),
    ("llama.expert_count", u32(8)),
    ("llama.final_logit_softcapping", f32(30.0)),
    ("tokenizer.ggml.eos_token_id", string("</s>")),
])  # fmt: skip
def test_values_that_cannot_be_served_name_the_key(tmp_path: Path, key: str, value: GgufValue | None) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, {key: value})
    assert key in str(caught.value) or str(value and struct.unpack("<I", value[1][:4])[0]) in str(caught.value)


def test_wrong_sizes_in_metadata_do_not_pass(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\[96, 64\].*\[97, 64\]"):
        read(tmp_path, {"llama.feed_forward_length": u32(97)})


def test_more_layers_than_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"9 of 29 tensors are missing: model\.layers\.2"):
        read(tmp_path, {"llama.block_count": u32(3)})


def test_tensors_that_no_family_here_has_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = llama_gguf_tensors() | {"blk.0.ffn_gate_exps.weight": ((4, 64), 0, bytes(1024))}
    path.write_bytes(gguf_bytes(LLAMA_METADATA, tensors))
    with pytest.raises(CheckpointError, match="ffn_gate_exps"):
        read_checkpoint(path)


def test_a_scale_of_a_matrix_is_refused_since_nobody_would_apply_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(LLAMA_METADATA, llama_gguf_tensors() | {"blk.0.attn_q.scale": ((1,), 0, bytes(4))}))
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj\.scale"):
        read_checkpoint(path)


def write_parts(folder: Path, count: int = 3) -> list[Path]:
    tensors = llama_gguf_tensors()
    names = list(tensors)
    paths = []
    for part in range(count):
        metadata = LLAMA_METADATA if part == 0 else {}
        number = {"split.count": (2, struct.pack("<H", count)), "split.no": (2, struct.pack("<H", part))}
        paths.append(folder / f"m-{part + 1:05}-of-{count:05}.gguf")
        mine = {name: tensors[name] for name in names[part::count]}
        paths[-1].write_bytes(gguf_bytes(metadata | number, mine))
    return paths


def test_a_model_in_parts_is_read_whole(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    checkpoint = read_checkpoint(paths[0])
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == expected_tensors(checkpoint.facts)
    assert {entry.file for entry in checkpoint.tensors.values()} == set(map(str, paths))


def test_the_first_part_must_be_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    for path in (paths[1], paths[0].rename(tmp_path / "renamed.gguf")):
        with pytest.raises(CheckpointError, match="-00001-of-00003"):
            read_checkpoint(path)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[2].unlink()
    with pytest.raises(CheckpointError, match="m-00003-of-00003"):
        read_checkpoint(paths[0])


def test_parts_of_different_models_and_data_that_no_tensor_claims_are_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf: split\.no is 1; 2 was expected"):
        read_checkpoint(paths[0])
    paths = write_parts(tmp_path)
    with open(paths[1], "ab") as file:
        file.write(bytes(64))
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: 64 bytes follow the last tensor"):
        read_checkpoint(paths[0])


def cached(name: str) -> Path:
    root = os.environ.get("MGPU_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgpu"
    path = Path(root) / "models" / name
    if not path.exists():
        pytest.skip(f"{name} is not in the cache")
    return path


def test_the_demo_model() -> None:
    facts = read_checkpoint(cached("smollm2-135m-instruct-q4_1.gguf")).facts
    assert (facts.num_layers, facts.num_q_heads, facts.num_kv_heads, facts.vocab_size) == (30, 9, 3, 49152)
    assert (facts.rope_theta, facts.tie_embeddings, facts.eos_token_ids) == (
        1e5,
        True,
        (2, 0, 4),
    )  # <|im_end|>, <|endoftext|>, <reponame>


def test_gemma_3_270m() -> None:
    facts = read_checkpoint(cached("gemma-3-270m-q4_k_m.gguf")).facts
    assert (facts.num_layers, facts.num_q_heads, facts.num_kv_heads, facts.head_dim) == (18, 4, 1, 256)
    assert [layer for layer in range(18) if not facts.sliding_layers[layer]] == [5, 11, 17]
    assert (facts.rope_theta, facts.rope_local_theta, facts.attention_scale) == (1e6, 1e4, 1 / 16)


def test_a_bos_of_all_bits_is_none(tmp_path: Path) -> None:
    assert read(tmp_path, {"tokenizer.ggml.bos_token_id": u32(0xFFFFFFFF)}).facts.bos_token_id is None
