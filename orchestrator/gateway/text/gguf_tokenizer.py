"""Build a `tokenizers.Tokenizer` from the vocabulary inside a GGUF file.

Three models cover the supported families: ``gpt2`` (byte-level BPE with its merges listed), ``llama`` (SentencePiece
BPE, whose merges follow from the scores) and ``gemma4`` (the same with its merges listed). The pre-tokenizer, which
GGUF only names, must be the very one that the model was trained with; an unknown name is refused, not approximated.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from mgpu.orchestrator.gateway.text.pre_tokenizers import (
    LLAMA3_NAMES,
    PRE_TOKENIZERS,
    ignores_merges,
    normalizer_of,
    pre_tokenizer_of,
)
from mgpu.protocol.checkpoint.gguf.tokens import SENTENCE_PIECE_IDS, hidden_texts, shown_texts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""``tokenizer.ggml.token_type``."""


class TokenizerError(ValueError):
    """The model's tokenizer cannot be used."""


class UnknownTokenizer(TokenizerError):
    """The file names a tokenizer that is unknown here: its model can still be asked with token ids."""


def build_tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    """Build the tokenizer that the metadata of a GGUF file describes. TokenizerError when it is not supported."""
    try:
        return _build(metadata)
    except TokenizerError:
        raise
    except Exception as error:  # the Rust side raises bare Exception for a vocabulary that contradicts itself
        raise TokenizerError(f"the tokenizer in the GGUF file is not usable: {str(error)[:200]}") from None


def _build(metadata: Mapping[str, object]) -> Tokenizer:
    tokens = _strings(metadata, "tokens")
    kinds = _token_kinds(metadata, len(tokens))
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif model == "llama":
        scores = _numbers(metadata.get("tokenizer.ggml.scores"), "scores", len(tokens))
        tokenizer = _sentence_piece(metadata, tokens, kinds, _merges_of(tokens, kinds, scores))
    elif model == "gemma4":
        tokenizer = _sentence_piece(metadata, tokens, kinds, _listed_merges(metadata))
    else:
        raise UnknownTokenizer(f"tokenizer model {str(model)[:40]!r} is not supported (gpt2, llama and gemma4 are)")
    _add_special_tokens(tokenizer, tokens, kinds)
    _add_ends(tokenizer, metadata)
    return tokenizer


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise TokenizerError(f"the GGUF file has no list tokenizer.ggml.{key}")
    return value


def _token_kinds(metadata: Mapping[str, object], count: int) -> Sequence[int]:
    return _numbers(metadata.get("tokenizer.ggml.token_type", [NORMAL] * count), "token_type", count)


def _numbers(value: object, key: str, count: int) -> Sequence[Any]:
    if not isinstance(value, (list, array)) or len(value) != count:
        found = f", found {len(value)}" if isinstance(value, (list, array)) else ""
        raise TokenizerError(f"tokenizer.ggml.{key} must have {count} entries, one per token{found}")
    return value


def _byte_level(metadata: Mapping[str, object], tokens: list[str]) -> Tokenizer:
    pre = _pre_tokenizer_name(metadata, tokens)
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnknownTokenizer(f"pre-tokenizer {pre[:40]!r} is not supported (supported: {known})")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocabulary, _listed_merges(metadata), fuse_unk=False, ignore_merges=ignores_merges(pre))
    tokenizer = Tokenizer(model)
    if (normalizer := normalizer_of(pre)) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer_of(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _listed_merges(metadata: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(metadata, "merges"))]


def _pre_tokenizer_name(metadata: Mapping[str, object], tokens: list[str]) -> str:
    """Return the pre-tokenizer that the file names. Early converters wrote none, or ``default``.

    Then the model tells it: every Qwen 2 and 3 has the same one, and Llama 3's vocabulary is known by its first
    special token. Other vocabularies are refused by name, because a wrong guess would go unnoticed.
    """
    pre = metadata.get("tokenizer.ggml.pre") or "default"
    if pre == "default" and metadata.get("general.architecture") in ("qwen2", "qwen3"):
        return "qwen2"
    if pre == "default" and "<|begin_of_text|>" in tokens:
        return "llama-bpe"
    return str(pre)


def _sentence_piece(
    metadata: Mapping[str, object], tokens: list[str], kinds: Sequence[int], merges: list[tuple[str, str]]
) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    if unknown is None:
        unknown = special_token(metadata, "unknown")
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges_of(tokens: list[str], kinds: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """List the merges that a SentencePiece vocabulary implies, best score first.

    SentencePiece always joins the adjacent pair whose union scores highest; so every way to cut a piece into two
    pieces is a merge with the rank of that piece (as transformers derives them).
    """
    ranks = {token: number for number, token in enumerate(tokens) if kinds[number] == NORMAL}
    ordered = sorted(ranks, key=lambda token: -scores[ranks[token]])  # stable: equal scores keep the order of ids
    merges: list[tuple[str, str]] = []
    for token in ordered:
        if len(token) > 1:
            cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
            pairs = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
            if len(pairs) > 1:
                pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
            merges += pairs
    return merges


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: Sequence[int]) -> None:
    """Add control tokens as special (skipped in text), and user-defined ones, which are matched first but shown.

    Some tokens are known by their text: those that end an answer are control tokens, whatever their type.
    """
    hidden, always_shown = hidden_texts(tokens), shown_texts(tokens)
    pairs = list(zip(tokens, kinds, strict=True))
    special = [
        token for token, kind in pairs if (kind in (CONTROL, UNKNOWN) and token not in always_shown) or token in hidden
    ]
    shown = [token for token, kind in pairs if (kind == USER_DEFINED and token not in hidden) or token in always_shown]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in shown])


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, object]) -> None:
    """Put BOS before a text and EOS behind it, as the file asks; else BOS where models of its kind have one."""
    pre = _pre_tokenizer_name(metadata, _strings(metadata, "tokens"))
    usual = metadata.get("tokenizer.ggml.model") == "llama" or pre in (*LLAMA3_NAMES, "tekken")
    bos = special_token(metadata, "bos") if metadata.get("tokenizer.ggml.add_bos_token", usual) else None
    eos = special_token(metadata, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    ends = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys((bos, eos)) if text is not None]
    if ends:
        parts = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ends)


def special_token(metadata: Mapping[str, object], name: str) -> str | None:
    """Return the token that the file calls ``name``, such as bos or unknown; None if there is none.

    Files of SentencePiece's kind that name none have its own numbers for them.
    """
    tokens, number = _strings(metadata, "tokens"), metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is None and metadata.get("tokenizer.ggml.model") == "llama":
        number = SENTENCE_PIECE_IDS.get(name)
    if isinstance(number, list):
        number = next(iter(number), None)
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None
