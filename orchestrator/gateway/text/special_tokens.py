"""Add the tokens that a model folder names outside tokenizer.json, by the rules of transformers.

``added_tokens_decoder`` of tokenizer_config.json lists such tokens. Older folders have special_tokens_map.json and
added_tokens.json instead; transformers reads these two only if there is no ``added_tokens_decoder``. A token that is
named (``eos_token``, …) or listed as additional is special: it is matched before all others and not shown.
"""

from collections.abc import Iterable, Mapping

from tokenizers import AddedToken, Tokenizer

from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError

_ATTRIBUTES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""The names that every tokenizer has, in the order in which their tokens get ids."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_folder_tokens(
    tokenizer: Tokenizer,
    config: Mapping[str, object],
    special_map: Mapping[str, object],
    added_tokens: Mapping[str, object],
) -> dict[str, str]:
    """Add the tokens that the three files name to ``tokenizer``. Return the named ones by name, for the template."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        described = dict(sorted((_number(key), _described(value)) for key, value in listed.items()))
        merged = dict(config)
    else:
        merged = {**config, **special_map}
        special = set(_named(merged).values()) | {token.content for token in _extra(merged)}
        described = dict(sorted((_number(key), _plain(text, text in special)) for text, key in added_tokens.items()))
    objects = known | {token.content: token for token in described.values()}
    named, extra = _named(merged), [objects.get(token.content, token) for token in _extra(merged)]
    known_reprs = set(map(repr, known.values()))
    tokenizer.add_tokens([token for token in described.values() if repr(token) not in known_reprs])
    values = [objects.get(text, AddedToken(text, special=True, normalized=False)) for text in named.values()]
    tokenizer.add_special_tokens([*values, *extra])
    return named


def _named(config: Mapping[str, object]) -> dict[str, str]:
    """Return the named special tokens: the usual names first, then further ones that a template may use."""
    others = config.get("extra_special_tokens")
    found = {key: value for key, value in config.items() if key.endswith("_token")}
    found |= others if isinstance(others, dict) else {}
    texts = {key: text for key, value in found.items() if (text := token_text(value)) is not None}
    return {key: texts[key] for key in _ATTRIBUTES if key in texts} | texts


def _extra(config: Mapping[str, object]) -> list[AddedToken]:
    """Return the special tokens without a name."""
    value = config.get("extra_special_tokens", config.get("additional_special_tokens"))
    texts: Iterable[object] = value if isinstance(value, list) else ()
    return [AddedToken(text, special=True, normalized=False) for item in texts if (text := token_text(item))]


def token_text(value: object) -> str | None:
    """Return the text of a token that is written as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _number(value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise TokenizerError(f"the number of an added token is {str(value)[:40]!r}") from None


def _described(value: object) -> AddedToken:
    text = token_text(value)
    if text is None:
        raise TokenizerError(f"an added token has no text: {str(value)[:80]}")
    flags = value if isinstance(value, dict) else {}
    return AddedToken(text, **{key: flag for key in _FLAGS if isinstance(flag := flags.get(key), bool)})


def _plain(text: str, special: bool) -> AddedToken:
    return AddedToken(text, normalized=not special, special=special)
