"""How many tokens a text has at least, from its bytes alone, so that a prompt that cannot fit is never tokenized.

If no token stands for more than L bytes of text, B bytes make at least B / L tokens. That holds only where nothing is
dropped or fused on the way: every byte of the text must end in some token. So only those parts of tokenizers count
that are known to keep every byte, and for all other tokenizers there is no bound.

Example: the longest token of a byte-level vocabulary is a run of 64 spaces, and the context holds 2,048 tokens. A
prompt of a megabyte has at least 16,384 tokens and is refused by its length.
"""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, models

from mgpu.orchestrator.gateway.text.detokenizer import byte_level_table

_KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Metaspace")
_KEEPING_SPLITS = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_COMPOSITION = 3
"""NFC makes a text at most three times shorter: a composed character of 2 bytes can come from three of 2 bytes each."""


def longest_token_bytes(tokenizer: Tokenizer) -> int | None:
    """Return the most bytes of text that one token stands for; None if there is no bound."""
    shrink = _shrinking(_parts(tokenizer.normalizer, "normalizers"))
    splits = list(_parts(tokenizer.pre_tokenizer, "pretokenizers"))
    added = tokenizer.get_added_tokens_decoder().values()
    if shrink is None or any(token.lstrip or token.rstrip for token in added):  # such tokens swallow white space
        return None
    if not all(_keeps_all(part) for part in splits):
        return None
    vocabulary = tokenizer.get_vocab()
    if not isinstance(tokenizer.model, models.BPE):
        return None  # others stand for a whole unknown word with one token
    if any(part["type"] == "ByteLevel" for part in splits):
        if not vocabulary.keys() >= byte_level_table().keys():
            return None
        longest = max(map(len, vocabulary))  # a character of the vocabulary is a byte of the text
    elif tokenizer.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        longest = max(len(piece.encode()) for piece in vocabulary)
    else:
        return None
    longest = max([longest, *(len(token.content.encode()) for token in added)])
    return longest * shrink


def has_nested_repeats(tokenizer: Tokenizer) -> bool:
    """Return whether a regular expression of the tokenizer repeats a group, which can take exponential time."""
    parts = [*_parts(tokenizer.normalizer, "normalizers"), *_parts(tokenizer.pre_tokenizer, "pretokenizers")]
    patterns = [pattern.get("Regex", "") for part in parts if isinstance(pattern := part.get("pattern"), dict)]
    return any(f"){sign}" in pattern for pattern in patterns for sign in "*+{")


def _parts(component: Any, inner: str) -> Iterator[dict[str, object]]:
    """Yield the state of a normalizer or pre-tokenizer, or of each one in a sequence of them."""
    if component is not None:
        yield from _flat(json.loads(component.__getstate__()), inner)


def _flat(state: dict[str, object], inner: str) -> Iterator[dict[str, object]]:
    parts = state.get(inner)
    if isinstance(parts, list):
        for part in parts:
            yield from _flat(part, inner)
    else:
        yield state


def _shrinking(normalizers: Iterator[dict[str, object]]) -> int | None:
    """Return how many times shorter the normalizers can make a text; None if they may drop any part of it."""
    factor = 1
    for part in normalizers:
        kind = part["type"]
        is_space = part.get("pattern") == {"String": " "} and part.get("content") == "▁"
        if kind == "NFC":
            factor *= _COMPOSITION
        elif kind != "Prepend" and not (kind == "Replace" and is_space):
            return None
    return factor


def _keeps_all(pre_tokenizer: dict[str, object]) -> bool:
    kind = pre_tokenizer["type"]
    return kind in _KEEPING_PRE_TOKENIZERS or (kind == "Split" and pre_tokenizer.get("behavior") in _KEEPING_SPLITS)
