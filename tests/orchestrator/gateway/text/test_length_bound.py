"""A bound of the number of tokens from the bytes of a text: never above the truth, and none where there is none."""

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mgpu.orchestrator.gateway.text.detokenizer import byte_level_table
from mgpu.orchestrator.gateway.text.length_bound import has_nested_repeats, longest_token_bytes
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec

ALPHABET = [
    "a",
    " ",
    "   ",
    "é",
    "e\u0301",
    "\u03b9\u0308\u0301",
    "漢",
    "\n",
    "👍",
    "▁",
    "<|end|>",
    "\u1100\u1161\u11a8",
]


def byte_level() -> Tokenizer:
    """A byte-level vocabulary with runs of spaces, as usual models have."""
    vocabulary, merges = dict(byte_level_table()), []
    for left, right in (("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("a", "a"), ("Ã", "©")):
        merges.append((left, right))
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return tokenizer


def sentence_piece(byte_fallback: bool = True) -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁▁", "▁a", "漢", "é"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(
        vocabulary, [("▁", "▁"), ("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def with_nfc() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece, with_nfc])
def test_no_text_has_fewer_tokens_than_the_bound_says(make: Callable[[], Tokenizer]) -> None:
    codec, rng = TextCodec(make(), None, {}), random.Random(5)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 200))) for _ in range(300)]
    texts += [each * 500 for each in ALPHABET]
    for text in texts:
        assert 0 < codec.least_tokens(text) <= len(codec.encode(text)), text[:40]


def test_the_bound_is_close_enough_to_be_of_use() -> None:
    assert longest_token_bytes(byte_level()) == len("<|end|>")
    assert longest_token_bytes(sentence_piece()) == len("▁▁".encode())
    assert longest_token_bytes(with_nfc()) == 3 * len("<|end|>")


def _strips(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("<|x|>", special=True, lstrip=True)])


def _lower(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])


def _drops_spaces(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _replaces(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(Regex(r"a+"), "a")


@pytest.mark.parametrize("spoil", [_strips, _lower, _drops_spaces, _replaces])
def test_a_tokenizer_that_may_drop_text_has_no_bound(spoil: Callable[[Tokenizer], None]) -> None:
    tokenizer = byte_level()
    spoil(tokenizer)
    assert longest_token_bytes(tokenizer) is None
    assert TextCodec(tokenizer, None, {}).least_tokens("x" * 10**6) == 0


def test_a_tokenizer_that_fuses_unknown_text_has_no_bound() -> None:
    assert longest_token_bytes(sentence_piece(byte_fallback=False)) is None
    word_level = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert longest_token_bytes(word_level) is None
    incomplete = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    incomplete.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert longest_token_bytes(incomplete) is None


@pytest.mark.parametrize(("pattern", "nested"), [
    (r"(a+)+b|.", True), (r"(?:x|y)*", True), (r"(a{1,9}){9}", True),
    (r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+", False),
])  # fmt: skip
def test_patterns_that_repeat_a_group_are_not_quick(pattern: str, nested: bool) -> None:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    assert has_nested_repeats(tokenizer) is nested
    assert TextCodec(tokenizer, None, {}).is_quick is not nested
