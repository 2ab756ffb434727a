"""Special and added tokens that a folder names outside tokenizer.json, judged by transformers."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.detokenizer import byte_level_table
from mgpu.orchestrator.gateway.text.tokenizer import TokenizerError, load_codec

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ sep_token }}"
CHAT = [{"role": "user", "content": "hi"}]
MAP = {"bos_token": START, "eos_token": {"content": END, "lstrip": False, "rstrip": False, "normalized": False}}
DECODER = {
    "258": {"content": START, "special": True, "normalized": False, "lstrip": False, "rstrip": False},
    "259": {"content": END, "special": False, "normalized": False, "lstrip": False, "rstrip": False},
}
CASES: dict[str, dict[str, Any]] = {
    "map": {"special_tokens_map": MAP},
    "map, null in the configuration": {"special_tokens_map": MAP, "tokenizer_config": {"bos_token": None}},
    "map and a further name": {"special_tokens_map": MAP | {"sep_token": "<sep>"}},
    "map with additional tokens": {"special_tokens_map": {"additional_special_tokens": [START, END]}},
    "map with extra objects": {"special_tokens_map": {"extra_special_tokens": [{"content": START}, END]}},
    "decoder": {"tokenizer_config": {"added_tokens_decoder": DECODER}},
    "decoder, backwards": {"tokenizer_config": {"added_tokens_decoder": dict(reversed(DECODER.items()))}},
    "decoder and a name": {"tokenizer_config": {"added_tokens_decoder": DECODER, "eos_token": END}},
    "decoder hides the map": {"tokenizer_config": {"added_tokens_decoder": DECODER}, "special_tokens_map": MAP},
    "added tokens": {"added_tokens": {START: 258, END: 259}},
    "added tokens and a map": {"added_tokens": {END: 259, START: 258}, "special_tokens_map": MAP},
    "additional tokens": {"tokenizer_config": {"additional_special_tokens": [START, END]}},
    "extra tokens": {"tokenizer_config": {"extra_special_tokens": [START, END]}},
    "a name alone": {"tokenizer_config": {"eos_token": "</s>", "bos_token": "<s>"}},
    "flags of a named object": {"special_tokens_map": {"eos_token": {"content": END, "rstrip": True, "lstrip": True}}},
    "flags in the configuration": {
        "tokenizer_config": {"pad_token": {"content": END, "rstrip": True, "__type": "AddedToken"}}
    },
    "a named token that is no special one": {
        "tokenizer_config": {"eos_token": "</s>", "additional_special_tokens": ["<s>"]}
    },
    "additional tokens beside further names": {
        "tokenizer_config": {"additional_special_tokens": [START], "extra_special_tokens": {"image_token": END}}
    },
    "a special token without its flag in the decoder": {
        "tokenizer_config": {"eos_token": END, "added_tokens_decoder": DECODER}
    },
    "nothing": {},
}


def write_folder(folder: Path, files: dict[str, Any]) -> None:
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(byte_level_table())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    for name, content in {**files, "tokenizer_config": base | files.get("tokenizer_config", {})}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("files", CASES.values(), ids=CASES)
def test_added_and_special_tokens_are_those_of_transformers(tmp_path: Path, files: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    write_folder(tmp_path, files)
    right = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    codec = load_codec(str(tmp_path), "safetensors")
    assert codec is not None
    text = f"{START}hi{END}<s>x</s><sep>"
    ids = codec.encode(text, add_special_tokens=False)
    assert ids == right(text, add_special_tokens=False)["input_ids"]
    for skip, shown in ((True, codec.shown_bytes), (False, codec.all_bytes)):
        assert b"".join(map(shown, ids)).decode() == right.decode(ids, skip_special_tokens=skip)
    assert codec.encode_chat(ChatPrompt(tuple(CHAT))) == right.apply_chat_template(CHAT, return_dict=False)


@pytest.mark.parametrize("name", ["decoder", "added tokens", "additional tokens", "map with additional tokens"])
def test_tokens_outside_the_tokenizer_are_one_token_each(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, CASES[name])
    codec = load_codec(str(tmp_path), "safetensors")
    assert codec is not None
    ids = [ord("h") - 33, ord("i") - 33]
    assert codec.encode(f"{START}hi{END}") == [258, *ids, 259]


def test_a_name_of_the_map_reaches_the_template(tmp_path: Path) -> None:
    write_folder(tmp_path, {"special_tokens_map": MAP, "added_tokens": {START: 258, END: 259}})
    codec = load_codec(str(tmp_path), "safetensors")
    assert codec is not None
    assert codec.encode_chat(ChatPrompt(tuple(CHAT)))[::3] == [258, 259]


@pytest.mark.parametrize("files", [
    {"added_tokens": {START: "x"}}, {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": START}}}},
    {"tokenizer_config": {"added_tokens_decoder": {"258": {"lstrip": True}}}},
])  # fmt: skip
def test_added_tokens_that_cannot_be_read_are_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    write_folder(tmp_path, files)
    with pytest.raises(TokenizerError, match="added token"):
        load_codec(str(tmp_path), "safetensors")


TEXTS = ["<s>", "</s>", "<pad>", START, END, "<x>", "<think>"]


def random_token(random: Random, text: str) -> object:
    """Write a token as a string, or as an object with random flags."""
    if random.random() < 0.5:
        return text
    flags = {key: random.random() < 0.15 for key in ("single_word", "lstrip", "rstrip", "normalized")}
    special = {"special": random.random() < 0.8} if random.random() < 0.7 else {}
    return {"content": text, **flags, **special, "__type": "AddedToken"}


def random_files(random: Random) -> dict[str, Any]:
    """Name tokens in some of the three files, in some of the ways that each of them has."""
    config: dict[str, Any] = {}
    special_map: dict[str, Any] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if random.random() < 0.4:
            config[key] = random.choice([None, random_token(random, random.choice(TEXTS))])
        if random.random() < 0.25:
            special_map[key] = random_token(random, random.choice(TEXTS))
    if random.random() < 0.3:
        config["additional_special_tokens"] = [random_token(random, text) for text in random.sample(TEXTS, 2)]
    if random.random() < 0.2:
        special_map["additional_special_tokens"] = random.sample(TEXTS, 2)
    if random.random() < 0.15:
        config["extra_special_tokens"] = {"image_token": random.choice(TEXTS)}
    fresh = random.sample(TEXTS[2:], random.randint(1, 4))
    files: dict[str, Any] = {"tokenizer_config": config}
    if random.random() < 0.4:
        described = {
            str(258 + number): {"content": text, "special": random.random() < 0.6} for number, text in enumerate(fresh)
        }
        config["added_tokens_decoder"] = described | {"256": {"content": "<s>", "special": random.random() < 0.5}}
    elif random.random() < 0.5:
        files["added_tokens"] = {text: 258 + number for number, text in enumerate(fresh)}
    return files | ({"special_tokens_map": special_map} if special_map else {})


@pytest.mark.parametrize("seed", range(60))
def test_random_folders_are_read_as_by_transformers(tmp_path: Path, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    random = Random(seed)
    write_folder(tmp_path, random_files(random))
    right = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    codec = load_codec(str(tmp_path), "safetensors")
    assert codec is not None
    text = "a " + "".join(each + random.choice(["", " ", "b", "\n"]) for each in random.choices(TEXTS, k=8)) + "end"
    ids = codec.encode(text, add_special_tokens=False)
    assert ids == right.encode(text, add_special_tokens=False)
    assert b"".join(map(codec.shown_bytes, ids)).decode() == right.decode(ids, skip_special_tokens=True)
