"""Do what a task asks of the tokenizer: in the gateway itself if the text is short, else in a process of its own."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.grammars.grammar import checked_grammar
from mgpu.orchestrator.gateway.text.grammars.thinking_limit import grammar_with_reasoning
from mgpu.orchestrator.gateway.text.processes.encoder_messages import TextReply, TextTask
from mgpu.orchestrator.gateway.text.text_queries import reply_to
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.chat.formats import opens_reasoning
from mgpu.protocol.front.fields import int32_bytes
from mgpu.protocol.front.server_messages import Tokenized
from mgpu.protocol.internal.grammars import token_table

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def do(codec: TextCodec, task: TextTask, vocab_size: int) -> TextReply:
    """Return the result.

    TokenizerError or ChatTemplateError when the text cannot be tokenized or rendered, GrammarError when an answer of
    the form that is asked for cannot be enforced.
    """
    query = task.tokenize or task.detokenize
    if query is not None:
        reply = reply_to(codec, query, vocab_size)
        return TextReply(tokenized=reply) if isinstance(reply, Tokenized) else TextReply(detokenized=reply)
    if task.structured_outputs is not None or task.thinking is not None:
        vocabulary = codec.vocabulary(vocab_size) if task.wants_vocabulary else None
        plain = replace(task, structured_outputs=None, thinking=None)
        prompt = TextReply() if task.prompt is None and task.chat is None else do(codec, plain, vocab_size)
        grammar, has_room = _grammar(codec, task, prompt.opens_reasoning, vocab_size)
        opens = prompt.opens_reasoning and has_room
        return replace(prompt, grammar=grammar, vocabulary=vocabulary, opens_reasoning=opens)
    is_chat = task.prompt is None
    text = codec.render_chat(task.chat or ChatPrompt(())) if task.prompt is None else task.prompt
    if (at_least := codec.least_tokens(text)) > task.longest:
        return TextReply(num_tokens=at_least, is_exact=False)
    ids = codec.encode(text, add_special_tokens=not is_chat)  # a template writes the special tokens itself
    fits = len(ids) <= task.longest
    return TextReply(int32_bytes(ids) if fits else b"", len(ids), opens_reasoning=is_chat and opens_reasoning(text))


@lru_cache(maxsize=1)
def _table(codec: TextCodec, vocab_size: int) -> "LLTokenizer":
    """Return the library's form of the vocabulary; each process builds it once."""
    return token_table(codec.vocabulary(vocab_size))


def _grammar(codec: TextCodec, task: TextTask, is_open: bool, vocab_size: int) -> tuple[str, bool]:
    """Return the grammar of an answer, empty if it may be anything, and whether it has room for reasoning."""

    def checked(form: Mapping[str, object] | None) -> str:
        return checked_grammar(form, lambda: _table(codec, vocab_size)) if form else ""

    if task.thinking is not None:
        encode = partial(codec.encode, add_special_tokens=False)
        if grammar := grammar_with_reasoning(task.thinking, is_open, checked(task.structured_outputs), encode):
            return grammar, True
    after = task.structured_after_reasoning if is_open else None
    return checked(after or task.structured_outputs), after is not None or task.structured_outputs is None
