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
        values, extra = _named_values(config), _extra(config)
        numbered = sorted((_number(key), _described(value)) for key, value in listed.items())
        described = {token.content: token for _, token in numbered}
    else:
        values = _named_values({**config, **{key: _always_special(value) for key, value in special_map.items()}})
        own = special_map.get("extra_special_tokens")
        listed_there = [_always_special(item) for item in own] if isinstance(own, list) else []
        mapped = _extra({"extra_special_tokens": listed_there})
        extra = _extra(config) + mapped or _extra(special_map)
        special = _texts_of_strings(config, special_map) | {token.content for token in mapped}
        numbered = sorted((_number(key), _plain(text, text in special)) for text, key in added_tokens.items())
        described = known | {token.content: token for _, token in numbered}
    texts = {token.content for token in values.values()}
    described = {text: _special(token) if text in texts else token for text, token in described.items()}
    named = [described.get(token.content, _special(token)) for token in values.values()]
    _add_once(tokenizer, known.values(), described.values(), named + extra)
    return {key: token.content for key, token in values.items()}


def _add_once(
    tokenizer: Tokenizer, known: Iterable[AddedToken], described: Iterable[AddedToken], others: Iterable[AddedToken]
) -> None:
    """Add described tokens unless they are known just so, and others unless their text is known."""
    known_reprs = set(map(repr, known))
    added = [token for token in described if repr(token) not in known_reprs]
    texts = {token.content for token in (*known, *added)}
    for token in others:
        if token.content not in texts and repr(token) not in map(repr, added):
            added.append(token)
    tokenizer.add_tokens(added)


def _special(token: AddedToken) -> AddedToken:
    """Return the same token as a special one."""
    return AddedToken(token.content, **{key: getattr(token, key) for key in _FLAGS if key != "special"}, special=True)


def _named_values(config: Mapping[str, object]) -> dict[str, AddedToken]:
    """Return the named special tokens: the usual names first, then further ones that a template may use."""
    others = config.get("extra_special_tokens")
    found = {key: value for key, value in config.items() if key.endswith("_token")}
    found |= others if isinstance(others, dict) else {}
    tokens = {key: token for key, value in found.items() if (token := _as_token(value)) is not None}
    return {key: tokens[key] for key in _ATTRIBUTES if key in tokens} | tokens


def _extra(config: Mapping[str, object]) -> list[AddedToken]:
    """Return the special tokens without a name."""
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(value := config.get(key), list) and value:
            return [token for item in value if (token := _as_token(item)) is not None]
    return []


def _texts_of_strings(config: Mapping[str, object], special_map: Mapping[str, object]) -> set[str]:
    """Return the texts of special tokens that are written as strings, or in special_tokens_map.json."""
    named = {key: value for key in _ATTRIBUTES if (value := special_map.get(key, config.get(key)))}
    texts = {value if isinstance(value, str) else token_text(special_map.get(key)) for key, value in named.items()}
    unnamed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    return {text for text in (*texts, *(unnamed if isinstance(unnamed, list) else ())) if isinstance(text, str)}


def _as_token(value: object) -> AddedToken | None:
    """Return a token that is written as a string or as an object; None for anything else."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return None if token_text(value) is None else _described(value)


def _always_special(value: object) -> object:
    """Return what special_tokens_map.json says of a token: it is special, whatever its flag."""
    return {**value, "special": True} if isinstance(value, dict) and "content" in value else value


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
