"""Tokenizers from GGUF files and from Hugging Face folders."""

import errno
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.models.model_files import gguf_bytes, string, string_array, u32
from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.detokenizer import Detokenizer, byte_level_table
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError, build_tokenizer
from mgpu.orchestrator.gateway.text.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_of
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec, load_codec

GOLDEN = Path(__file__).parents[3] / "golden"
MODELS = ["smollm2-135m-instruct", "gemma-3-270m"]
TEXTS = [
    "Hello, world!",
    "  leading and   inner    spaces  ",
    "tabs\tand\nnewlines\r\n\n\n  mixed \t\n",
    "def f(x):\n    return {'a': [1, 2.5e-3, 0xFF], \"b\": x ** 2}  # comment\n",
    "Ünïcödé ñandú Ελληνικά кириллица עברית العربية हिन्दी ไทย",
    "日本語 中文 한국어 — “quotes” … ﬁ",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 a\u0308",
    "1234567890 3.14159 2026-01-01 12:34:56",
    "don't can't I'll we've it's 'quoted'",
    "\x00\x01\x7f\u200b\ufeff\U0010ffff",
    "https://example.org/a?b=c&d=%20#frag <html><b>x</b></html>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def cached_model(name: str) -> str:
    cache = os.environ.get("MGPU_CACHE")
    base = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mgpu"
    path = base / "models" / json.loads((GOLDEN / f"{name}.json").read_text())["gguf"]
    if not path.exists():
        pytest.skip(f"{path} is not in the cache (`make demo` fetches the default model)")
    return str(path)


_codecs: dict[str, TextCodec] = {}


@pytest.fixture
def codec_of() -> Callable[[str], TextCodec]:
    """Load the tokenizer of a real model; each once per session."""

    def load(name: str) -> TextCodec:
        if name not in _codecs:
            codec = load_codec(cached_model(name), "gguf")
            assert codec is not None
            _codecs[name] = codec
        return _codecs[name]

    return load


def text_of(codec: TextCodec, ids: list[int]) -> str:
    detokenizer = Detokenizer(codec.all_bytes)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@pytest.mark.parametrize("name", MODELS)
def test_real_models_tokenize_and_detokenize_as_the_golden_file_says(
    codec_of: Callable[[str], TextCodec], name: str
) -> None:
    codec = codec_of(name)
    for prompt in json.loads((GOLDEN / f"{name}.json").read_text())["prompts"]:
        assert codec.encode(prompt["prompt"]) == prompt["prompt_ids"]
        assert text_of(codec, prompt["output_ids"]) == prompt["output_text"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives_encoding_and_decoding(codec_of: Callable[[str], TextCodec], name: str, text: str) -> None:
    codec = codec_of(name)
    assert text_of(codec, codec.encode(text, add_special_tokens=False)) == text


def test_the_default_models_chat_template_is_rendered(codec_of: Callable[[str], TextCodec]) -> None:
    codec = codec_of("smollm2-135m-instruct")
    ids = codec.encode_chat(ChatPrompt(({"role": "user", "content": "Hi"},)))
    text = text_of(codec, ids)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids[0] == 1  # <|im_start|> as one token


def test_the_default_models_tokenizer_loads_at_once() -> None:
    path = cached_model("smollm2-135m-instruct")
    load_codec(path, "gguf")
    started = time.process_time()
    load_codec(path, "gguf")
    assert time.process_time() - started < 1.0  # about 0.2 s on an idle core


def byte_level(pre: str, **extra: object) -> dict[str, Any]:
    tokens = [*byte_level_table(), "Ġa", "12", "<|x|>"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3], "tokenizer.ggml.merges": ["Ġ a", "1 2"], **extra,
    }  # fmt: skip


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_all_bytes(pre: str) -> None:
    metadata = byte_level(pre, **{"tokenizer.ggml.bos_token_id": 258, "tokenizer.ggml.add_bos_token": False})
    codec = TextCodec(build_tokenizer(metadata), None, {})
    for text in TEXTS:
        if "qwen" not in pre or "\u0301" not in text:  # Qwen composes characters (NFC), as its own tokenizer does
            assert text_of(codec, codec.encode(text)) == text


def test_digits_are_split_as_the_model_was_trained() -> None:
    def digits(pre: str) -> list[str | None]:
        metadata = byte_level(pre, **{"tokenizer.ggml.add_bos_token": False})
        tokenizer = build_tokenizer(metadata)
        return [tokenizer.id_to_token(number) for number in tokenizer.encode("1212").ids]

    assert digits("gpt-2") == ["12", "12"]
    assert digits("llama-bpe") == ["12", "1", "2"]  # groups of three
    assert digits("smollm") == digits("qwen2") == digits("tekken") == ["1", "2", "1", "2"]


@pytest.mark.parametrize(("pre", "text", "pieces"), [
    ("gpt-4o", "HelloWorld don't 1234//\n\nx", ["Hello", "World", " don't", " ", "123", "4", "//\n\n", "x"]),
    ("llama4", "ABc", ["ABc"]),
    ("tekken", "HelloWorld don't 12", ["Hello", "World", " don", "'t", " ", "1", "2"]),
    ("qwen35", "हिन्दी 12", ["हिन्दी", " ", "1", "2"]),
    ("qwen2", "हिन्दी", ["ह", "िन", "्द", "ी"]),
    ("deepseek-v3", "x=(foo) 1234日本語です", ["x", "=(", "foo", ")", " ", "123", "4", "日本語です"]),
    ("deepseek-v3", "a.b c", ["a", ".b", " c"]),
    ("glm4", "it's 1234", ["it", "'s", " ", "123", "4"]),
    ("refact", "a12", ["a", "1", "2"]),
])  # fmt: skip
def test_text_is_cut_as_the_model_was_trained(pre: str, text: str, pieces: list[str]) -> None:
    table = byte_level_table()
    cut = pre_tokenizer_of(pre).pre_tokenize_str(text)
    assert [bytes(table[letter] for letter in piece).decode() for piece, _ in cut] == pieces


def test_bos_follows_the_file_else_the_kind_of_model() -> None:
    bos = {"tokenizer.ggml.bos_token_id": 258}
    assert build_tokenizer(byte_level("gpt-2", **bos)).encode("x").ids[0] != 258
    assert build_tokenizer(byte_level("llama-bpe", **bos)).encode("x").ids[0] == 258
    assert build_tokenizer(byte_level("tekken", **bos)).encode("x").ids[0] == 258
    flag = {"tokenizer.ggml.add_bos_token": True}
    assert build_tokenizer(byte_level("gpt-2", **bos, **flag)).encode("x").ids[0] == 258


def sentence_piece(space_prefix: bool) -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "▁", "a", "b", "▁a", "ab", "▁ab", "\n\n", *[f"<0x{byte:02X}>" for byte in range(256)]]
    scores = [0.0, 0.0, -9.0, -8.0, -7.0, -3.0, -2.0, -1.0, -1000.0, *[0.0] * 256]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 1, 1, 1, 1, 1, 1, 4, *[6] * 256], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_space_prefix": space_prefix,
    }  # fmt: skip


def test_a_sentence_piece_vocabulary_may_list_its_merges() -> None:
    metadata = sentence_piece(False) | {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": ["a b", "▁ a"]}
    tokenizer = build_tokenizer(metadata)
    assert [tokenizer.id_to_token(number) for number in tokenizer.encode(" ab\u00e9").ids] == [
        "▁", "ab", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode(" ab\u00e9").ids) == " ab\u00e9"


def test_sentence_piece_merges_follow_the_scores_and_bytes_are_the_fallback() -> None:
    tokenizer = build_tokenizer(sentence_piece(space_prefix=False))
    assert tokenizer.encode("ab ab").tokens == ["<s>", "ab", "▁ab"]
    assert tokenizer.encode("é\n\n").tokens == ["<s>", "<0xC3>", "<0xA9>", "\n\n"]
    assert build_tokenizer(sentence_piece(space_prefix=True)).encode("ab").tokens == ["<s>", "▁ab"]


def test_sentence_piece_has_its_own_numbers_where_a_file_names_none() -> None:
    metadata = sentence_piece(space_prefix=False)
    for key in ("bos", "unknown"):
        del metadata[f"tokenizer.ggml.{key}_token_id"]
    assert build_tokenizer(metadata).encode("ab").tokens == ["<s>", "ab"]
    metadata["tokenizer.ggml.bos_token_id"] = 0xFFFFFFFF
    assert build_tokenizer(metadata).encode("ab").tokens == ["ab"]


def test_an_end_of_sequence_is_added_if_the_file_asks_for_it() -> None:
    ends = {
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_eos_token": True,
    }
    assert build_tokenizer(byte_level("llama-bpe", **ends)).encode("x").ids == [258, 87, 257]
    assert build_tokenizer(byte_level("gpt-2", **ends)).encode("x").ids == [87, 257]
    assert build_tokenizer(byte_level("gpt-2", **ends)).encode("x", add_special_tokens=False).ids == [87]
    same = ends | {"tokenizer.ggml.bos_token_id": 257}
    assert build_tokenizer(byte_level("llama-bpe", **same)).encode("x").ids == [257, 87, 257]


@pytest.mark.parametrize(("text", "kind", "shown"), [
    ("<|fim_prefix|>", 1, False), ("<fim_middle>", 4, False), ("<|file_sep|>", 1, False), ("<reponame>", 4, False),
    ("<|channel|>", 3, True), ("<|message|>", 4, True), ("<|other|>", 3, False), ("<|other|>", 4, True),
])  # fmt: skip
def test_some_tokens_are_known_by_their_text(text: str, kind: int, shown: bool) -> None:
    metadata = byte_level("gpt-2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], text]
    metadata["tokenizer.ggml.token_type"] = [1] * 258 + [kind]
    codec = TextCodec(build_tokenizer(metadata), None, {})
    assert codec.encode(text) == [258]
    assert codec.shown_bytes(258) == (text.encode() if shown else b"")


def test_a_special_token_as_a_stop_string_is_found_only_where_it_is_shown() -> None:
    codec = TextCodec(build_tokenizer(byte_level("gpt-2")), None, {})
    for bytes_of, stops in ((codec.shown_bytes, False), (codec.all_bytes, True)):
        detokenizer = Detokenizer(bytes_of, ["<|x|>"])
        shown = "".join(detokenizer.push(token) for token in codec.encode("hi<|x|>you")) + detokenizer.flush()
        assert (detokenizer.stopped, shown) == (stops, "hi" if stops else "hiyou")


@pytest.mark.parametrize(("change", "words"), [
    ({"tokenizer.ggml.pre": "unheard-of"}, "supported: gpt-2"),
    ({"tokenizer.ggml.model": "t5"}, "gpt2, llama and gemma4 are"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.token_type": [1]}, "259 entries"),
    ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
    ({"tokenizer.ggml.merges": ["Ġ nonsense"]}, "nonsense"),
])  # fmt: skip
def test_an_unusable_vocabulary_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        build_tokenizer({**byte_level("gpt-2"), **change})


@pytest.mark.parametrize(
    ("model", "pre", "said"), [("gpt2", "kimi-k2", "pre-tokenizer"), ("t5", "", "tokenizer model")]
)
def test_a_file_with_an_unknown_tokenizer_takes_token_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, pre: str, said: str
) -> None:
    path = tmp_path / "m.gguf"
    metadata = {
        "tokenizer.ggml.model": string(model), "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": string_array(byte_level_table()), "tokenizer.ggml.merges": string_array(["a b"]),
    }  # fmt: skip
    path.write_bytes(gguf_bytes(metadata, {}))
    assert load_codec(str(path), "gguf") is None
    assert said in caplog.text
    assert "only requests with prompt_ids will work" in caplog.text


@pytest.mark.parametrize("text", ["<|eot_id|>", "<end_of_turn>", "<|im_end|>", "</s>"])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_a_token_that_ends_an_answer_is_never_shown(tmp_path: Path, text: str, kind: int) -> None:
    tokens = [*byte_level_table(), "x", text]
    metadata = {
        "tokenizer.ggml.model": string("gpt2"), "tokenizer.ggml.pre": string("gpt-2"),
        "tokenizer.ggml.tokens": string_array(tokens), "tokenizer.ggml.merges": string_array(["a b"]),
        "tokenizer.ggml.token_type": (9, struct.pack("<IQ258i", 5, 258, *[1] * 257, kind)),
        "tokenizer.ggml.eos_token_id": u32(256),
    }  # fmt: skip
    metadata["tokenizer.ggml.tokens"] = string_array([*tokens[:98], "ab", *tokens[99:]])
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(metadata, {}))
    codec = load_codec(str(path), "gguf")
    assert codec is not None
    assert codec.encode(text) == [257]
    assert (codec.shown_bytes(257), codec.all_bytes(257)) == (b"", text.encode())
    assert codec.shown_bytes(256) == b""  # named in the metadata


@pytest.mark.parametrize("kind", [1, 4])
def test_runs_of_spaces_of_a_sentence_piece_file_are_shown_as_spaces(kind: int) -> None:
    metadata = sentence_piece(space_prefix=False)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "▁▁▁▁"]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], 0.0]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], kind]
    codec = TextCodec(build_tokenizer(metadata), None, {})
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert (codec.shown_bytes(last), codec.text_of(last)) == (b"    ", "    ")
    assert text_of(codec, [8, last, 3]) == "\n\n    a"


def llama3(**changes: object) -> dict[str, Any]:
    tokens = [*byte_level_table(), "12", "123", "45", "456", "Ġi", "it", "'S", "x", "y", "z", "<|begin_of_text|>"]
    return {
        "tokenizer.ggml.model": "gpt2", "general.architecture": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3], "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.merges": ["1 2", "12 3", "4 5", "45 6", "i t", "' S"], **changes,
    }  # fmt: skip


@pytest.mark.parametrize("named", [{}, {"tokenizer.ggml.pre": "default"}, {"tokenizer.ggml.pre": ""}])
def test_llama3_and_qwen_are_known_without_the_name_of_a_pre_tokenizer(named: dict[str, object]) -> None:
    tokens = ["<|begin_of_text|>", "123", "456", "Ġ", "it", "'S"]
    assert build_tokenizer(llama3(**named)).encode("123456 it'S").tokens == tokens
    for architecture in ("qwen2", "qwen3"):
        metadata = {**byte_level("gpt-2", **{"general.architecture": architecture}), "tokenizer.ggml.pre": "default"}
        assert build_tokenizer(metadata | named).encode("1212").tokens == ["1", "2", "1", "2"]


@pytest.mark.parametrize("named", [{"tokenizer.ggml.pre": None}, {"tokenizer.ggml.pre": "default"}])
def test_an_unknown_vocabulary_without_the_name_of_a_pre_tokenizer_is_refused(named: dict[str, object]) -> None:
    with pytest.raises(TokenizerError, match="pre-tokenizer 'default' is not supported"):
        build_tokenizer(byte_level("gpt-2", **{"general.architecture": "llama"}) | named)


def test_a_folder_is_read_as_transformers_does(model_folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    codec = load_codec(str(tmp_path), "safetensors")
    assert codec is not None
    assert codec.encode("hé") == [256, *"hé".encode()]
    assert codec.shown_bytes(257) == b""
    assert codec.all_bytes(257) == b"</s>"
    assert codec.all_bytes(290) == b""  # padding of the vocabulary
    assert codec.text_of(0xE2) == "\ufffd"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}X")
    newer = load_codec(str(tmp_path), "safetensors")
    assert newer is not None
    assert newer.encode_chat(ChatPrompt(({"role": "user", "content": "x"},))) == [256, ord("X")]


def test_a_folder_without_tokenizer_has_none_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert load_codec(str(tmp_path), "safetensors") is None
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_codec(str(tmp_path), "safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ],
)
def test_a_link_out_of_the_folder_a_pipe_and_a_huge_file_are_refused(
    model_folder: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"private": "words"}')
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    file = folder / name
    for make, words in (
        (lambda: file.symlink_to(secret), "outside the model folder"),
        (lambda: file.symlink_to(tmp_path / "nowhere"), "cannot be read"),
        (lambda: os.mkfifo(file), "not a regular file"),
        (lambda: truncated(file, 1 << 40), "1099511627776 bytes, more than"),
    ):
        file.unlink(missing_ok=True)
        make()
        with pytest.raises(TokenizerError, match=words) as refused:
            load_codec(str(folder), "safetensors")
        assert "private" not in str(refused.value)


def truncated(file: Path, size: int) -> None:
    """Make a file that claims to be large and takes no space."""
    file.touch()
    os.truncate(file, size)


def test_a_link_into_the_blobs_of_the_same_cache_entry_is_followed(model_folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(model_folder, blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    codec = load_codec(str(snapshot), "safetensors")
    assert codec is not None
    assert codec.has_chat_template


def test_json_that_is_nested_without_end_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text("[" * 200_000)
    with pytest.raises(TokenizerError, match="not JSON"):
        load_codec(str(tmp_path), "safetensors")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_cannot_be_read_is_a_mistake_of_the_user(
    model_folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("X")
    read_text = Path.read_text

    def read(file: Path, encoding: str) -> str:
        if file.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(file, encoding=encoding)

    monkeypatch.setattr(Path, "read_text", read)
    with pytest.raises(TokenizerError, match=rf"{name}: cannot be read: Input/output error"):
        load_codec(str(folder), "safetensors")


def test_a_gguf_file_that_is_none_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(TokenizerError, match=r"x\.gguf"):
        load_codec(str(tmp_path / "x.gguf"), "gguf")
