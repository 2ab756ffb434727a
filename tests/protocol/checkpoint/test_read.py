"""Model folders: shards and index, and everything that a broken or hostile folder may hold."""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from harness.models.model_files import LLAMA_CONFIG, safetensors_bytes, write_config, write_index, write_llama_folder
from mgpu.protocol.checkpoint.files.safetensors_file import MAX_HEADER_BYTES
from mgpu.protocol.checkpoint.files.untrusted import MAX_JSON_BYTES
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, expected_tensors, read_checkpoint
from mgpu.protocol.internal.codec import Codec
from mgpu.protocol.model.facts import LoadFormat, ModelFacts


def refusal(folder: Path, load_format: LoadFormat = "auto") -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, load_format)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def is_complete(checkpoint: Checkpoint) -> bool:
    expected = expected_tensors(checkpoint.facts)
    return {name: entry.shape for name, entry in checkpoint.tensors.items()} == expected


def test_a_folder_with_one_file_is_read(tmp_path: Path) -> None:
    write_llama_folder(tmp_path)
    checkpoint = read_checkpoint(str(tmp_path))
    assert is_complete(checkpoint)
    assert (checkpoint.source.path, checkpoint.source.format) == (str(tmp_path), "safetensors")
    entry = checkpoint.tensors["model.layers.1.self_attn.k_proj.weight"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("F32", (32, 64), 32 * 64 * 4)
    assert entry.file == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_read_with_and_without_an_index(tmp_path: Path, with_index: bool) -> None:
    write_llama_folder(tmp_path, num_shards=3)
    if not with_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    checkpoint = read_checkpoint(tmp_path)
    assert is_complete(checkpoint)
    assert len({entry.file for entry in checkpoint.tensors.values()}) == 3


def test_entries_point_at_the_tensors_bytes(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA_CONFIG)
    shapes = expected_tensors(read_checkpoint(tmp_path, "dummy").facts)
    data = bytearray(safetensors_bytes(shapes))
    data[-4:] = struct.pack("<f", 7.5)  # the last element of the last tensor
    (tmp_path / "model.safetensors").write_bytes(data)
    entry = read_checkpoint(tmp_path).tensors[list(shapes)[-1]]
    with open(entry.file, "rb") as file:
        file.seek(entry.offset)
        values = file.read(entry.nbytes)
    assert struct.unpack("<f", values[-4:]) == (7.5,)
    assert not any(values[:-4])


def test_dummy_needs_only_the_configuration(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA_CONFIG | {"torch_dtype": "bfloat16"})
    checkpoint = read_checkpoint(tmp_path, "dummy")
    assert is_complete(checkpoint)
    assert checkpoint.source.load_format == "dummy"
    entry = checkpoint.tensors["lm_head.weight"]
    assert (entry.dtype, entry.file, entry.nbytes) == ("BF16", "", 100 * 64 * 2)


def test_weights_that_follow_from_the_configuration_are_ignored(tmp_path: Path) -> None:
    write_llama_folder(tmp_path)
    extra = safetensors_bytes({"model.layers.0.self_attn.rotary_emb.inv_freq": (8,), "vision.patch": (2,)})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(extra)
    assert is_complete(read_checkpoint(tmp_path))


def test_the_original_consolidated_copy_of_the_weights_is_not_read_twice(tmp_path: Path) -> None:
    write_llama_folder(tmp_path, num_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "consolidated.safetensors").write_bytes(b"whatever")
    assert is_complete(read_checkpoint(tmp_path))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_model_is_found(tmp_path: Path, prefix: str) -> None:
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "model_type": "gemma3_text",
    }  # fmt: skip
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    write_config(tmp_path, config)
    names = expected_tensors(read_checkpoint(tmp_path, "dummy").facts)
    wrapped = {prefix + name.removeprefix("model."): shape for name, shape in names.items()}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(wrapped | {"vision_tower.x.weight": (3, 3)}))
    assert is_complete(read_checkpoint(tmp_path))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_stored_head_is_used_whatever_the_configuration_says(tmp_path: Path, shards: int) -> None:
    write_llama_folder(tmp_path, shards)
    write_config(tmp_path, LLAMA_CONFIG | {"tie_word_embeddings": True})
    checkpoint = read_checkpoint(tmp_path)
    assert not checkpoint.facts.tie_embeddings
    assert is_complete(checkpoint)
    assert "lm_head.weight" in checkpoint.tensors


# What may be wrong with a folder


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "absent")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


def test_a_configuration_without_weights(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA_CONFIG)
    assert "no .safetensors weights" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_a_way_to_convert_them(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, LLAMA_CONFIG)
    (tmp_path / name).write_bytes(b"\x80\x04")
    message = refusal(tmp_path)
    assert name in message
    assert "can run code" in message
    assert "save_pretrained" in message


def test_a_file_that_is_neither_folder_nor_gguf(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x04")
    assert "can run code" in refusal(path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\\b", "a\0b"]
)
def test_an_index_that_names_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_llama_folder(folder)
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    shapes = expected_tensors(read_checkpoint(folder).facts)
    write_index(folder, dict.fromkeys(shapes, name))
    assert "not a plain file name" in refusal(folder)


def test_a_shard_that_links_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_llama_folder(folder)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "outside the model folder" in refusal(folder)


def test_links_into_the_blobs_of_the_same_hub_cache_entry_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--org--m" / "snapshots" / "abc", tmp_path / "models--org--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_llama_folder(snapshot)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert is_complete(read_checkpoint(snapshot))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_special_files_are_not_opened(tmp_path: Path, name: str) -> None:
    write_llama_folder(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refusal(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    write_llama_folder(tmp_path, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    message = refusal(tmp_path)
    assert "2 weight files" in message
    assert "3" in message


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_shard_names_the_file_and_both_sizes(tmp_path: Path, cut: int) -> None:
    write_llama_folder(tmp_path, num_shards=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    message = refusal(tmp_path)
    assert f"{path.name}: truncated" in message
    assert str(len(data)) in message
    assert str(len(data) - cut) in message


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
Damage = Callable[[Path], object]


def written(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def reshaped(change: Mapping[str, tuple[int, ...] | None], dtype: str = "F32") -> Damage:
    """Write the weights with other shapes; None leaves a tensor out."""

    def rewrite(folder: Path) -> None:
        shapes = expected_tensors(read_checkpoint(folder, "dummy").facts) | change
        kept = {name: shape for name, shape in shapes.items() if shape is not None}
        (folder / WEIGHTS).write_bytes(safetensors_bytes(kept, dtype))

    return rewrite


def described(change: object) -> Damage:
    """Write the weights with another description of one tensor."""
    return lambda folder: (folder / WEIGHTS).write_bytes(
        safetensors_bytes(expected_tensors(read_checkpoint(folder).facts), changes={NORM: change})
    )


DESCRIPTIONS: list[tuple[object, str]] = [
    ({"dtype": "F13"}, "unknown dtype"), ({"dtype": ["F32"]}, "unknown dtype"),
    ({"shape": [65]}, "needs 260 bytes"), ({"shape": [1 << 61, 1 << 61]}, "needs"),
    ({"shape": [-64]}, "no usable shape"), ({"shape": "64"}, "no usable shape"),
    ({"shape": [64.0]}, "no usable shape"), ({"shape": [1] * 1000}, "no usable shape"),
    ({"data_offsets": [0, 256]}, "overlaps"), ({"data_offsets": [256, 0]}, "no usable byte range"),
    ({"data_offsets": [-256, 0]}, "no usable byte range"), ({"data_offsets": [1 << 60, (1 << 60) + 256]}, "gap"),
    ({"data_offsets": [0]}, "no usable byte range"), ({"data_offsets": None}, "no usable byte range"),
    (5, "not described by an object"),
]  # fmt: skip
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "trailing bytes":
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x"), ["trailing"]),
    **{f"no safetensors but {content[:9]!r}": (written(WEIGHTS, content), [WEIGHTS])
       for content in (b"", b"1234567", bytes(8), b"PK\x03\x04" + bytes(100))},
    **{f"a header of {length} bytes": (written(WEIGHTS, struct.pack("<Q", length) + bytes(1000)), [str(length)])
       for length in (1 << 20, 1 << 62, (1 << 64) - 1, MAX_HEADER_BYTES + 1)},
    **{f"a header that is no object but {text[:13]!r}": (written(WEIGHTS, struct.pack("<Q", len(text)) + text), [])
       for text in (b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":1,"a":2}', b'{"t":%s}' % (b"9" * 5000))},
    **{f"a tensor described as {str(change)[:40]}": (described(change), [words, WEIGHTS])
       for change, words in DESCRIPTIONS},
    "a missing tensor is named": (reshaped({UP: None}), [UP]),
    "a wrong shape is named with the expected one": (reshaped({UP: (64, 96)}), ["[64, 96]", "[96, 64]"]),
    **{f"{name}, which the family does not have, is not left out silently": (reshaped({name: (64,)}), [name])
       for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight")},
    "types that cannot be loaded are named": (reshaped({}, "F8_E4M3"), ["F8_E4M3", "BF16"]),
    **{f"an index like {text}": (written(INDEX, text.encode()), [INDEX]) for text in (
        "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}', "{", "")},
    "a configuration of many megabytes":
        (lambda folder: os.truncate(folder / "config.json", MAX_JSON_BYTES + 1), [str(MAX_JSON_BYTES + 1)]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_with_what_is_wrong(tmp_path: Path, damage: Damage, words: list[str]) -> None:
    write_llama_folder(tmp_path)
    damage(tmp_path)
    assert_has_all(refusal(tmp_path), *words)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_llama_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes({NORM: (64,)}))
    message = refusal(tmp_path)
    assert NORM in message
    assert "also in" in message


def test_an_index_may_name_tensors_that_nobody_needs_and_places_that_are_wrong(tmp_path: Path) -> None:
    write_llama_folder(tmp_path, num_shards=2)
    path = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    other = shards[1] if weight_map[NORM] == shards[0] else shards[0]
    write_index(tmp_path, weight_map | {NORM: other, "model.layers.0.self_attn.rotary_emb.inv_freq": shards[0]})
    assert is_complete(read_checkpoint(tmp_path))
    write_index(tmp_path, weight_map | {"lm_head.weight": "model-00003-of-00003.safetensors"})
    assert "model-00003-of-00003.safetensors" in refusal(tmp_path)


def test_a_whole_file_goes_before_a_stale_index(tmp_path: Path) -> None:
    write_llama_folder(tmp_path)
    write_index(tmp_path, {NORM: "model-00001-of-00002.safetensors", UP: "model-00002-of-00002.safetensors"})
    assert is_complete(read_checkpoint(tmp_path))


def test_of_a_tensor_in_two_indexed_files_the_last_counts(tmp_path: Path) -> None:
    write_llama_folder(tmp_path, num_shards=2)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    (tmp_path / "model-x.safetensors").write_bytes(safetensors_bytes({NORM: (64,)}))
    write_index(tmp_path, weight_map | {NORM: "model-x.safetensors"})
    checkpoint = read_checkpoint(tmp_path)
    assert is_complete(checkpoint)
    assert checkpoint.tensors[NORM].file.endswith("model-x.safetensors")


SCALES = ("self_attn.k_scale", "self_attn.v_scale", "self_attn.kv_scale", "self_attn.k_proj.k_scale",
          "self_attn.v_proj.output_scale", "self_attn.rotary_emb.inv_freq")  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_a_float8_cache_are_ignored(tmp_path: Path, name: str) -> None:
    write_llama_folder(tmp_path)
    reshaped({f"model.layers.1.{name}": (1,)})(tmp_path)
    assert is_complete(read_checkpoint(tmp_path))


def test_names_without_their_prefix(tmp_path: Path) -> None:
    config = LLAMA_CONFIG | {"tie_word_embeddings": True}
    write_config(tmp_path, config)
    shapes = expected_tensors(read_checkpoint(tmp_path, "dummy").facts)
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    (tmp_path / WEIGHTS).write_bytes(safetensors_bytes(bare))
    assert is_complete(read_checkpoint(tmp_path))


@pytest.mark.parametrize(("config", "kinds", "expected"), [
    ({"attention_bias": True}, ("q_proj", "k_proj", "v_proj"), (True, False, False)),
    ({"attention_bias": True}, (), (False, False, False)),
    ({"attention_bias": True, "mlp_bias": True}, ("q_proj", "k_proj", "v_proj", "o_proj"), (True, True, False)),
])  # fmt: skip
def test_biases_that_no_file_has_are_zero(
    tmp_path: Path, config: dict[str, object], kinds: tuple[str, ...], expected: tuple[bool, ...]
) -> None:
    write_config(tmp_path, LLAMA_CONFIG | config)
    shapes = expected_tensors(read_checkpoint(tmp_path, "dummy").facts)
    kept = {name: shape for name, shape in shapes.items() if not name.endswith(".bias") or name.split(".")[-2] in kinds}
    (tmp_path / WEIGHTS).write_bytes(safetensors_bytes(kept))
    facts = read_checkpoint(tmp_path).facts
    assert (facts.qkv_bias, facts.output_bias, facts.mlp_bias) == expected


def test_a_quantization_left_over_beside_plain_weights_is_ignored_but_for_random_ones(tmp_path: Path) -> None:
    write_llama_folder(tmp_path)
    write_config(tmp_path, LLAMA_CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert is_complete(read_checkpoint(tmp_path))
    assert read_checkpoint(tmp_path, "dummy").facts.formats[0].down.name == "GPTQ int4, a scale per output"
    reshaped_by_config = expected_tensors(read_checkpoint(tmp_path).facts)
    changed = {UP.replace("weight", "qweight"): {"dtype": "I32"}}
    shapes = {name.replace(UP, UP.replace("weight", "qweight")): shape for name, shape in reshaped_by_config.items()}
    (tmp_path / WEIGHTS).write_bytes(safetensors_bytes(shapes, changes=changed))
    assert f"{UP.replace('weight', 'qweight')!r} has no scales beside it" in refusal(tmp_path)


def test_links_from_a_folder_below_a_snapshot_are_followed_into_the_same_entry_only(tmp_path: Path) -> None:
    entry = tmp_path / "models--org--m"
    folder, blobs = entry / "snapshots" / "abc" / "checkpoint-10", entry / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    write_llama_folder(folder)
    for name in ("config.json", WEIGHTS):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(Path("../../../blobs") / name)
    assert is_complete(read_checkpoint(folder))
    (folder / WEIGHTS).unlink()
    (blobs / WEIGHTS).rename(entry / WEIGHTS)
    (folder / WEIGHTS).symlink_to(entry / WEIGHTS)
    assert "outside the model folder" in refusal(folder)


def test_facts_survive_the_way_to_a_worker(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA_CONFIG)
    facts = read_checkpoint(tmp_path, "dummy").facts
    codec = Codec(ModelFacts)
    assert codec.decode(codec.encode(facts)) == facts


def test_expected_tensors_count_every_weight_once(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA_CONFIG)
    facts = read_checkpoint(tmp_path, "dummy").facts
    per_layer = 64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3 + 2 * 64
    assert sum(map(math.prod, expected_tensors(facts).values())) == 2 * per_layer + 64 + 2 * 100 * 64
