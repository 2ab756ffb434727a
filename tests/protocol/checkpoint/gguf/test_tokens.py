"""End tokens of GGUF files: named, known by their text, or SentencePiece's own, as in llama.cpp."""

import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.models.model_files import (
    LLAMA_METADATA,
    GgufValue,
    gguf_bytes,
    llama_gguf_tensors,
    string,
    string_array,
    u32,
)
from mgpu.protocol.checkpoint.gguf.tokens import ending_texts, hidden_texts, shown_texts
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint


def read(folder: Path, metadata: Mapping[str, GgufValue | None] = {}) -> Checkpoint:
    """Read the tiny llama with changed metadata (None removes a key)."""
    merged = {key: value for key, value in {**LLAMA_METADATA, **metadata}.items() if value is not None}
    path = folder / "model.gguf"
    path.write_bytes(gguf_bytes(merged, llama_gguf_tensors()))
    return read_checkpoint(path)


def u32_array(items: list[int]) -> GgufValue:
    return 9, struct.pack(f"<IQ{len(items)}I", 4, len(items), *items)


def with_texts(texts: dict[int, str]) -> GgufValue:
    return string_array([texts.get(number, f"t{number}") for number in range(100)])


@pytest.mark.parametrize(("named", "texts", "expected"), [
    ({"eos_token_id": u32(1)}, {1: "<eos>", 6: "<end_of_turn>"}, (1, 6)),
    ({"eos_token_id": u32(1)}, {1: "<|end_of_text|>", 9: "<|eot_id|>", 8: "<|eom_id|>"}, (1, 8, 9)),
    ({"eos_token_id": u32(5)}, {4: "<|endoftext|>", 5: "<|im_end|>"}, (5, 4)),
    ({"eos_token_id": u32(4)}, {4: "<|endoftext|>", 5: "<|im_end|>"}, (4, 5)),
    ({"eos_token_id": u32(0xFFFFFFFF)}, {7: "<|end|>"}, (7,)),
    ({"eos_token_id": u32(0xFFFFFFFF)}, {}, ()),
    ({"eos_token_id": u32(3), "eot_token_id": u32(0xFFFFFFFF)}, {2: "</s>"}, (3, 2)),
    ({"eos_token_id": u32_array([3, 9])}, {}, (3, 9)),
    ({"eos_token_id": None, "eos_token_ids": u32_array([3, 9])}, {}, (3, 9)),
    ({"eos_token_id": (5, struct.pack("<i", -1))}, {}, ()),
    ({"eos_token_id": None}, {99: "<\uff5cend▁of▁sentence\uff5c>"}, (99,)),
    ({}, {7: "<|fim_pad|>", 8: "<|repo_name|>", 9: "<|file_sep|>"}, (2, 7, 8, 9)),  # Qwen 2.5 Coder
    ({}, {7: "<fim_pad>", 8: "<reponame>", 9: "<fim_prefix>"}, (2, 7, 8)),  # Granite
    ({}, {7: "[PAD]", 8: "[EOT]", 9: "[EOS]"}, (2, 7, 8, 9)),
    ({"fim_pad_token_id": u32(4), "fim_sep_token_id": u32(0xFFFFFFFF)}, {7: "<|fim_pad|>", 9: "<|file_sep|>"}, (2, 4)),
    ({}, {6: "<|end|>", 7: "<|return|>", 8: "<|call|>"}, (2, 7, 8)),  # <|end|> ends a part of the answer
    ({}, {6: "<|end|>", 7: "<|flush|>", 8: "<|calls|>"}, (2, 7, 8)),
    ({}, {6: "<|end|>", 7: "<|return|>"}, (2, 6, 7)),
    ({}, {2: "</s>", 7: "<|tool_response>", 8: "<turn|>"}, (7, 8)),
    ({"model": string("llama"), "eos_token_id": None}, {}, (2,)),
    ({"model": string("llama"), "eos_token_id": u32(0xFFFFFFFF)}, {}, ()),
    ({"model": string("gpt2"), "eos_token_id": None}, {}, ()),
])  # fmt: skip
def test_end_tokens_are_also_found_by_their_text(
    tmp_path: Path, named: dict[str, GgufValue | None], texts: dict[int, str], expected: tuple[int, ...]
) -> None:
    changes = {f"tokenizer.ggml.{key}": value for key, value in named.items()}
    assert read(tmp_path, {"tokenizer.ggml.tokens": with_texts(texts), **changes}).facts.eos_token_ids == expected


def test_end_tokens_are_found_in_a_vocabulary_that_is_too_big_to_build_otherwise(tmp_path: Path) -> None:
    tokens = string_array([*[f"t{number}" for number in range(9000)], "<|eot_id|>"])
    assert read(tmp_path, {"tokenizer.ggml.tokens": tokens}).facts.eos_token_ids == (2, 9000)


def test_what_is_shown_and_hidden_follows_from_the_vocabulary() -> None:
    texts = ["<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>", "<fim-prefix>", "hello", "</s>"]
    assert ending_texts(texts) == {"<|return|>", "<|call|>", "</s>"}
    assert hidden_texts(texts) == {"<|return|>", "<|call|>", "</s>", "<fim-prefix>"}
    assert shown_texts(texts) == {"<|end|>", "<|channel|>", "<|message|>"}
    assert shown_texts(["<|end|>", "hello"]) == frozenset()
