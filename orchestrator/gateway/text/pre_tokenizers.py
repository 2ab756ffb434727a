"""How byte-level tokenizers of GGUF files cut text before their merges apply, by the name that the file has for it.

A file only names its pre-tokenizer. It must be the very one that the model was trained with, so the patterns are those
of the models' own `tokenizer.json`, and a name that is not here is refused.
"""

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SLASHES = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_CASES[0]}|{_CASES[1]}|\p{{N}}|{_SLASHES}"
_GPT4O = rf"{_CASES[0]}{_CONTRACTIONS}?|{_CASES[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHES}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Chinese and Japanese
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES,
)
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")
"""Digits one by one, then GPT-2's pattern: Granite's files are called refact."""
_PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*LLAMA3_NAMES, "dbrx", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), (_GPT4O,)),
    "deepseek-v3": _DEEPSEEK3,
}
PRE_TOKENIZERS = ("gpt-2", *_SINGLE_DIGITS, *_PATTERNS)
_COMPOSING = ("qwen2", "qwen35", "deepseek-r1-qwen")
"""Their tokenizers compose characters first (NFC)."""


def pre_tokenizer_of(name: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of one of `PRE_TOKENIZERS`."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return plain
    if name in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def normalizer_of(name: str) -> normalizers.Normalizer | None:
    """Return what changes text before it is cut; None if nothing does."""
    return normalizers.NFC() if name in _COMPOSING else None


def ignores_merges(name: str) -> bool:
    """Return True if a piece that is a token is never built from its merges."""
    return name in (*LLAMA3_NAMES, "tekken")
