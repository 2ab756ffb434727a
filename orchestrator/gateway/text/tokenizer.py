"""The model's text side: encode prompts, render chats, and look up the bytes of a token."""

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt, ChatTemplate, ChatTemplateError
from mgpu.orchestrator.gateway.text.detokenizer import byte_level_bytes, sentence_piece_bytes
from mgpu.orchestrator.gateway.text.generic_tools import with_generic_tools
from mgpu.orchestrator.gateway.text.gguf_tokenizer import (
    TokenizerError,
    UnknownTokenizer,
    build_tokenizer,
    special_token,
)
from mgpu.orchestrator.gateway.text.length_bound import has_nested_repeats, longest_token_bytes
from mgpu.orchestrator.gateway.text.panics import Panic, no_panics
from mgpu.orchestrator.gateway.text.special_tokens import add_folder_tokens
from mgpu.protocol.checkpoint.files.gguf_file import read_gguf
from mgpu.protocol.checkpoint.files.untrusted import MAX_JSON_BYTES, CheckpointError, Fields, checked_file
from mgpu.protocol.checkpoint.files.wrong_kind import HEAD_BYTES, wrong_kind
from mgpu.protocol.checkpoint.gguf.tokens import end_tokens
from mgpu.protocol.internal.worker_messages import Vocabulary
from mgpu.protocol.model.facts import CheckpointFormat

log = logging.getLogger(__name__)

_SPECIAL_NAMES = ("bos", "eos", "unk", "pad")
_MAX_FILE_BYTES = 128 << 20
"""Four times the largest tokenizer.json in use."""


class TextCodec:
    """Tokenizer and chat template of one model. Encoding is safe in several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        special_tokens: Mapping[str, str | None],
        end_tokens: Collection[int] = (),
    ) -> None:
        """``special_tokens`` maps bos_token, eos_token, … to their text, for the template; None if there is none.

        ``end_tokens`` are not shown, like the special tokens.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        special = {name: text for name, text in special_tokens.items() if text is not None}
        self._template_source, self._template_tokens = template, special
        self._template: ChatTemplate | None = None
        """Compiled when it is first used."""
        self._longest = longest_token_bytes(tokenizer)
        self.is_quick = not has_nested_repeats(tokenizer)
        """As far as is known, every short text is encoded in a moment."""
        self._to_bytes = byte_level_bytes if _is_byte_level(tokenizer) else sentence_piece_bytes
        added = tokenizer.get_added_tokens_decoder()
        self._added = {number: self._to_bytes(token.content) for number, token in added.items()}
        hidden = (number for number, token in added.items() if token.special or self._is_skipped(number))
        self._special = frozenset(hidden).union(end_tokens)
        self.shown_bytes = lru_cache(maxsize=1 << 18)(self._shown_bytes)
        self.all_bytes = lru_cache(maxsize=1 << 18)(self._all_bytes)

    def _is_skipped(self, number: int) -> bool:
        """Return True for a token that was special once: it stays so, though it was added again without the flag."""
        shown = self._tokenizer.decode([number], skip_special_tokens=False)
        return bool(shown) and not self._tokenizer.decode([number], skip_special_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    @property
    def template_source(self) -> str | None:
        """The text of the chat template."""
        return self._template_source

    def shown_bytes_with(self, markers: Collection[str]) -> Callable[[int], bytes]:
        """Return what `shown_bytes` does, but show special tokens whose text is one of ``markers``."""
        shown = frozenset(marker.encode() for marker in markers)
        also = frozenset(number for number, text in self._added.items() if number in self._special and text in shown)
        if not also:
            return self.shown_bytes
        return lambda token_id: self.all_bytes(token_id) if token_id in also else self.shown_bytes(token_id)

    def least_tokens(self, text: str) -> int:
        """Return how many tokens ``text`` has at least; 0 if only encoding it can tell."""
        return 0 if self._longest is None else -(-len(text.encode()) // self._longest)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``, with the beginning-of-sequence token if the model wants one."""
        try:
            # Only the batch call releases the interpreter lock, so that a long prompt does not stop the poll loop.
            with no_panics("the text cannot be tokenized"):
                [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        except Panic as panic:
            raise TokenizerError(str(panic)) from None
        except Exception as error:  # the Rust side raises bare Exception
            raise TokenizerError(f"the text cannot be tokenized: {str(error)[:200]}") from None
        return list(encoding.ids)

    def encode_chat(self, chat: ChatPrompt) -> list[int]:
        """Render ``chat`` with the template and encode it. ChatTemplateError when there is none or it refuses."""
        # The template writes the special tokens itself.
        return self.encode(self.render_chat(chat), add_special_tokens=False)

    def render_chat(self, chat: ChatPrompt) -> str:
        """Return the text that the template makes of ``chat``. ChatTemplateError as in `encode_chat`."""
        if self._template_source is None:
            raise ChatTemplateError("the model has no chat template; send a prompt instead of messages")
        if self._template is None:
            self._template = ChatTemplate(self._template_source, self._template_tokens)
        return self._template.render(with_generic_tools(chat, self._template_source))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of ``token_ids``; bytes that are no character are U+FFFD."""
        try:
            with no_panics("the token ids have no text"):
                return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
        except Panic as panic:
            raise TokenizerError(str(panic)) from None
        except Exception as error:  # the Rust side raises bare Exception
            raise TokenizerError(f"the token ids have no text: {str(error)[:200]}") from None

    def text_of(self, token_id: int) -> str:
        """Return one token as text on its own; bytes that are no character are U+FFFD."""
        return self.all_bytes(token_id).decode(errors="replace")

    def vocabulary(self, size: int) -> Vocabulary:
        """Return the bytes of the tokens with ids below ``size``, for workers that follow grammars."""
        special = sorted(number for number in self._special if number < size)
        return Vocabulary(0, [self._all_bytes(number) for number in range(size)], special)

    def _shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special else self._all_bytes(token_id)

    def _all_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added
        with no_panics(f"token {token_id} has no text"):
            piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._to_bytes(piece)  # ids of vocabulary padding have no piece


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    kinds = _decoder_kinds(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None)
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return False
    raise TokenizerError(f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not supported")


def _decoder_kinds(state: object) -> set[str]:
    if not isinstance(state, dict):
        return set()
    inner = [_decoder_kinds(item) for item in state.get("decoders", [])]
    return {str(state.get("type"))}.union(*inner)


def load_codec(path: str, model_format: CheckpointFormat) -> TextCodec | None:
    """Load the tokenizer beside the weights; None when there is none, or an unknown one.

    TokenizerError when it is unusable.
    """
    try:
        with no_panics(f"{path}: not a usable tokenizer"):
            return _load(path, model_format)
    except Panic as panic:
        raise TokenizerError(str(panic)) from None


def _load(path: str, model_format: CheckpointFormat) -> TextCodec | None:
    if model_format == "gguf":
        return _from_gguf(path)
    folder = Path(path)
    file = _find(folder, "tokenizer.json")
    return None if file is None else _from_folder(folder, file)


def _from_gguf(path: str) -> TextCodec | None:
    try:
        metadata = read_gguf(path, with_arrays=True).metadata
        ends = end_tokens(Fields(path, metadata, "tokenizer.ggml."))
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    try:
        tokenizer = build_tokenizer(metadata)
    except UnknownTokenizer as error:
        log.warning(
            f"{path}: {error}: only requests with prompt_ids will work; the model's Hugging Face folder, which has a "
            "tokenizer.json, takes text"
        )
        return None
    keys = zip(_SPECIAL_NAMES, ("bos", "eos", "unknown", "padding"), strict=True)
    special = {f"{name}_token": special_token(metadata, key) for name, key in keys}
    template = metadata.get("tokenizer.chat_template")
    return TextCodec(tokenizer, template if isinstance(template, str) else None, special, ends)


def _from_folder(folder: Path, file: Path) -> TextCodec:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception for any defect of the file
        with file.open("rb") as opened:
            kind = wrong_kind(opened.read(HEAD_BYTES))
        reason = f"it {kind}" if kind else str(error)[:200]
        raise TokenizerError(f"{file}: not a usable tokenizer: {reason}") from None
    config = _read_json(folder, "tokenizer_config.json")
    special_map = _read_json(folder, "special_tokens_map.json")
    named = add_folder_tokens(tokenizer, config, special_map, _read_json(folder, "added_tokens.json"))
    return TextCodec(tokenizer, _template_of(folder, config), named)


def _template_of(folder: Path, config: Mapping[str, object]) -> str | None:
    """Find the template as transformers does: chat_template.jinja, chat_template.json, tokenizer_config.json."""
    file = _find(folder, "chat_template.jinja")
    if file is not None:
        return _read_text(file)
    value = _read_json(folder, "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _find(folder: Path, name: str) -> Path | None:
    """Return the path of a file, None if it is absent. TokenizerError if it links out of the folder or is too large."""
    if not os.path.lexists(folder / name):
        return None
    try:
        file = checked_file(folder, name)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    most = _MAX_FILE_BYTES if name == "tokenizer.json" else MAX_JSON_BYTES
    if (size := file.stat().st_size) > most:
        raise TokenizerError(f"{file}: {size} bytes, more than the {most} allowed")
    return file


def _read_json(folder: Path, name: str) -> dict[str, object]:
    file = _find(folder, name)
    if file is None:
        return {}
    text = _read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file}: not UTF-8: {error}") from None
