"""Text of clients against tokenizers of every shape, chat templates, and the files that describe a tokenizer."""

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bench.fuzz.choices import Choices
from bench.fuzz.target import Target
from bench.fuzz.targets.model_files import byte_level_metadata, sentence_piece_metadata
from bench.fuzz.targets.scratch import written
from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt, ChatTemplate, ChatTemplateError
from mgpu.orchestrator.gateway.text.detokenizer import Detokenizer
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError, build_tokenizer
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec, load_codec

BYTE_LEVEL = ("gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3")
PLAIN = ("gpt-2", "smollm", "llama-bpe", "tekken", "gpt-4o", "deepseek-v3")
"""Those whose tokens, put together, are the text."""
SHAPES = (*BYTE_LEVEL, "sentence-piece", "sentence-piece-bare", "unigram", "added", "words")
WORDS = (
    "<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<start_of_turn>", "<strip>", "<word>",
    "<0x0A>", "▁", "▁▁", "  ", "hello", "don't", "ﬁ", "[MASK]",
)  # fmt: skip


@cache
def codec_of(shape: str) -> TextCodec:
    """Return a small tokenizer of one shape."""
    if shape in BYTE_LEVEL:
        return TextCodec(build_tokenizer(byte_level_metadata(shape)), None, {})
    if shape.startswith("sentence-piece"):
        return TextCodec(build_tokenizer(sentence_piece_metadata(shape == "sentence-piece")), None, {})
    return TextCodec({"unigram": _unigram, "added": _added, "words": _words}[shape](), None, {})


def _unigram() -> Tokenizer:
    pieces = [
        ("<unk>", 0.0),
        *((f"<0x{byte:02X}>", -20.0) for byte in range(256)),
        ("▁", -2.0),
        ("▁a", -3.0),
        ("hello", -4.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def _added() -> Tokenizer:
    """Return one whose added tokens take the spaces beside them, match whole words only, or are normalized first."""
    tokenizer = build_tokenizer(byte_level_metadata("gpt-2"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.add_tokens([AddedToken("<strip>", lstrip=True, rstrip=True), AddedToken("<word>", single_word=True)])
    tokenizer.add_tokens([AddedToken("DON'T", normalized=True), AddedToken("  ", normalized=False), AddedToken("é")])
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|im_end|>",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<|begin_of_text|>", "<|im_end|>")],
    )
    return tokenizer


def _words() -> Tokenizer:
    """Return one without bytes to fall back to, cut by a regular expression with look-around."""
    vocabulary = {"[UNK]": 0, "hello": 1, "a": 2, "1": 3, "▁": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]", fuse_unk=True))
    split = pre_tokenizers.Split(Regex(r"(?<=\p{L})(?=\p{N})|\s+(?!\S)|[^\s]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def tokenize(data: bytes) -> None:
    """Encode a text and decode it in pieces; where a tokenizer loses nothing, the text must come back."""
    choices = Choices(data)
    shape = choices.pick(SHAPES)
    adds_special_tokens, stop = bool(choices.number(1)), choices.text(WORDS)[:256]
    text = choices.text(WORDS)
    codec = codec_of(shape)
    ids = codec.encode(text, adds_special_tokens)
    assert all(0 <= number < 1 << 31 for number in ids)
    whole = b"".join(map(codec.all_bytes, ids))
    if shape in PLAIN and not adds_special_tokens:
        assert whole == text.encode(), "the tokens are not the text"
    shown = Detokenizer(codec.shown_bytes, (stop,) if stop else (), choices.number())
    pieces = "".join(map(shown.push, ids[:5000])) + shown.flush()
    pieces.encode()


def read_tokenizer_files(data: bytes) -> None:
    """Load a folder whose tokenizer files are slightly wrong, and use it."""
    choices = Choices(data)
    tree = json.loads(_whole(choices.pick(("gpt-2", "unigram", "added", "words"))))
    folder = written("tokenizer/tokenizer.json", _dumped(_changed_tree(choices, tree))).parent
    special = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": True},
        "additional_special_tokens": ["<x>"],
    }
    listed = {"0": {"content": "<pad>", "special": True}, "261": {"content": "<y>", "normalized": False}}
    files: tuple[tuple[str, dict[str, object]], ...] = (
        ("tokenizer_config.json", {"added_tokens_decoder": listed, "chat_template": "{{ messages }}", **special}),
        ("special_tokens_map.json", special),
        ("added_tokens.json", {"<z>": 262}),
    )
    for name, whole in files:
        written(f"tokenizer/{name}", _dumped(_changed_tree(choices, whole)))
    codec = load_codec(str(folder), "safetensors")
    assert codec is not None
    for number in codec.encode("Hello <x> <strip> é 123\n")[:50]:
        codec.text_of(number)


@cache
def _whole(shape: str) -> str:
    text: str = codec_of(shape)._tokenizer.to_str()
    return text


def _dumped(tree: object) -> bytes:
    return json.dumps(tree, default=repr).encode("utf-8", "replace")


def _changed_tree(choices: Choices, tree: Any) -> Any:
    """Replace or remove a few nodes anywhere in the tree, or put a node where another was."""
    for _ in range(choices.number(3)):
        node = tree
        while isinstance(node, (dict, list)) and node:
            key = choices.pick(list(node)) if isinstance(node, dict) else choices.number(len(node) - 1)
            if not choices.number(2) or not isinstance(node[key], (dict, list)) or not node[key]:
                _change(choices, node, key)
                break
            node = node[key]
    return tree


def _change(choices: Choices, node: Any, key: Any) -> None:
    if choices.number(5) == 0:
        del node[key]
    else:
        node[key] = choices.value(
            2, (*WORDS, "ByteLevel", "BPE", "Sequence", "Split", "Regex", "isolated", "(a+)+b", ".*")
        )


EXPRESSIONS = (
    "messages", "messages[0].content", "message.role", "messages|length", "'a' * 9", "bos_token", "x|join(',')",
    "range(9)", "namespace(a=1)", "messages|tojson", "loop.index", "2 ** 9", "'%s' % 1", "[1] * 9",
    "strftime_now('%Y')", "''.join('a')", "raise_exception('no')", "message.content.split('x')", "cycler(1)",
    "messages|map(attribute='role')|list", "''.__class__", "lipsum(9)", "dict(a=1)", "'a'|center(99)", "(1).__add__",
    "messages|batch(2)", "x.y.z", "1 / 0", "caller()", "self", "messages[::-1]", "'{:99}'.format(1)", "'a'.ljust(99)",
    "messages|string|indent(9)|upper", "[[[[]]]]", "true is true",
)  # fmt: skip
STATEMENTS = (
    "{% for message in messages %}", "{% endfor %}", "{% if x %}", "{% else %}", "{% endif %}", "{% set x = 1 %}",
    "{% macro m() %}", "{% endmacro %}", "{% block b %}", "{% endblock %}", "{% raw %}", "{% endraw %}", "{% break %}",
    "{% continue %}", "{% generation %}", "{% endgeneration %}", "{% call m() %}", "{% endcall %}", "{% include 'x' %}",
    "{% import 'x' as y %}", "{% extends 'x' %}", "{% set ns.a = 2 %}", "{% filter upper %}", "{% endfilter %}",
    "{% with %}", "{% endwith %}", "{% for a in range(99999) recursive %}", "{{ loop(1) }}", "{# x", "#}", "{{", "}}",
    "{%", "%}", "-%}", "{% set x = x ~ x %}", "{% elif %}", "{% autoescape true %}", "{% endautoescape %}",
    "{% do x %}",
)  # fmt: skip


def render(data: bytes) -> None:
    """Render a template that was put together from pieces."""
    choices = Choices(data)
    parts: list[str] = []
    while not choices.is_empty and len(parts) < 300:
        kind = choices.number(7)
        if kind <= 2:
            parts.append(choices.pick(STATEMENTS))
        elif kind <= 4:
            parts.append("{{ " + choices.pick(EXPRESSIONS) + " }}")
        elif kind == 5:
            parts.append(choices.data(choices.number(20)).decode("utf-8", "replace"))
        elif kind == 6 and parts:
            parts += [parts[-1]] * choices.pick((2, 10, 30, 100))
        else:
            parts.append(
                choices.pick(("(", ")", "[", "]", "|", "~", "+", "'", '"', "{", "}", " if ", " is ", " not ", "\n"))
            )
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "Hi {{ x }}"},
        {"role": "assistant", "content": "é"},
    ]
    chat = ChatPrompt(tuple(messages), options={"thinking": True})
    ChatTemplate("".join(parts), {"bos_token": "<s>"}, time_limit_s=0.2).render(chat)


def _text_seeds() -> list[bytes]:
    return [bytes([at, 1, 0, 2, 5]) + b"Hello" for at in range(len(SHAPES))]


def _template_seeds() -> list[bytes]:
    return [b"\0\0\3\2\0\1", b"\4\4\4\5", *(bytes([0, at]) for at in range(len(STATEMENTS)))]


TEXT: dict[str, Target] = {
    "tokenizer-input": Target(
        tokenize, (TokenizerError,), _text_seeds, tuple(word.encode() for word in WORDS), most_s=2.0
    ),
    "tokenizer-files": Target(
        read_tokenizer_files, (TokenizerError,), lambda: [bytes([at, 0, 0, 0, 0]) for at in range(4)], most_s=2.0
    ),
    "template": Target(render, (ChatTemplateError,), _template_seeds, most_s=2.0),
}
