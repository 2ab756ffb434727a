"""Which tokens of a GGUF vocabulary end an answer, and which are shown, by llama.cpp's rules.

llama.cpp goes by the text of a token as well as by the metadata (llama-vocab.cpp): converters often name only one of
several, and give wrong types.
"""

from collections.abc import Collection, Sequence

from mgpu.protocol.checkpoint.files.untrusted import Fields

END_TEXTS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>",
    "<\uff5cend▁of▁sentence\uff5c>", "</s>", "<eos>", "<turn|>", "<|tool_response>",
))  # fmt: skip
"""Texts of tokens that end an answer, whatever their type."""
_FILL_ENDS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
"""Tokens for filling in the middle that end an answer: their key, else their texts."""
_FILL_TEXTS = frozenset((
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "<|code_middle|>", "<|middle|>",
)).union(*_FILL_ENDS.values())  # fmt: skip
_ALWAYS_SHOWN = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))
"""Tokens that frame the parts of one answer."""
SENTENCE_PIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""The numbers of SentencePiece's own tokens, where a file of its kind names none."""


def end_tokens(tokenizer: Fields) -> tuple[int, ...]:
    """Return the tokens that end an answer: those that the metadata names, then those known by their text.

    ``tokenizer`` are the metadata below ``tokenizer.ggml.``.
    """
    tokens = tokenizer.raw("tokens")
    texts = [str(text) for text in tokens] if isinstance(tokens, list) else []
    keys = [f"{name}_token_{ids}" for name in ("eos", "eot", "eom") for ids in ("id", "ids")]
    found = [token for key in keys for token in tokenizer.token_ids(key)]
    if tokenizer.raw("model") == "llama" and not any(tokenizer.declares(f"eos_token_{ids}") for ids in ("id", "ids")):
        found.append(SENTENCE_PIECE_IDS["eos"])
    known = set(ending_texts(texts))
    for key, fill_texts in _FILL_ENDS.items():
        found += tokenizer.token_ids(key)
        known.update(() if tokenizer.declares(key) else fill_texts)
    found += [number for number, text in enumerate(texts) if text in known]
    framing = {number for number, text in enumerate(texts) if text in END_TEXTS and text not in known}
    return tuple(token for token in dict.fromkeys(found) if token not in framing)


def ending_texts(texts: Collection[str]) -> frozenset[str]:
    """Return the texts that end an answer in this vocabulary.

    Where a vocabulary has others for the end of an answer, <|end|> ends a part of it, and </s> is text.
    """
    found = END_TEXTS.intersection(texts)
    calls = found & {"<|call|>", "<|calls|>"}
    if calls and found & {"<|return|>", "<|flush|>"}:
        found -= {"<|end|>"}
    return found - {"</s>"} if "<|tool_response>" in found else found


def hidden_texts(texts: Sequence[str]) -> frozenset[str]:
    """Return the texts of tokens that are special, whatever their type."""
    return ending_texts(texts) | _FILL_TEXTS.intersection(texts)


def shown_texts(texts: Sequence[str]) -> frozenset[str]:
    """Return the texts of tokens that are shown, whatever their type."""
    return _ALWAYS_SHOWN.intersection(texts) | (END_TEXTS.intersection(texts) - ending_texts(texts))
