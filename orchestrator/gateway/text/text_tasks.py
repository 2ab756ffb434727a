"""Do what a task asks of the tokenizer: in the gateway itself if the text is short, else in a process of its own."""

from collections.abc import Mapping
from dataclasses import replace

from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.encoder_messages import TextReply, TextTask
from mgpu.orchestrator.gateway.text.grammar import checked_grammar
from mgpu.orchestrator.gateway.text.text_queries import reply_to
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.chat.formats import opens_reasoning
from mgpu.protocol.front.fields import int32_bytes
from mgpu.protocol.front.server_messages import Tokenized
from mgpu.protocol.internal.grammars import token_table


def do(codec: TextCodec, task: TextTask, vocab_size: int) -> TextReply:
    """Return the result.

    TokenizerError or ChatTemplateError when the text cannot be tokenized or rendered, GrammarError when an answer of
    the form that is asked for cannot be enforced.
    """
    query = task.tokenize or task.detokenize
    if query is not None:
        reply = reply_to(codec, query, vocab_size)
        return TextReply(tokenized=reply) if isinstance(reply, Tokenized) else TextReply(detokenized=reply)
    if task.structured_outputs is not None:
        vocabulary = codec.vocabulary(vocab_size) if task.wants_vocabulary else None
        plain = replace(task, structured_outputs=None)
        prompt = TextReply() if task.prompt is None and task.chat is None else do(codec, plain, vocab_size)
        wanted = (prompt.opens_reasoning and task.structured_after_reasoning) or task.structured_outputs
        return replace(prompt, grammar=_grammar(codec, wanted, vocab_size), vocabulary=vocabulary)
    is_chat = task.prompt is None
    text = codec.render_chat(task.chat or ChatPrompt(())) if task.prompt is None else task.prompt
    if (at_least := codec.least_tokens(text)) > task.longest:
        return TextReply(num_tokens=at_least, is_exact=False)
    ids = codec.encode(text, add_special_tokens=not is_chat)  # a template writes the special tokens itself
    fits = len(ids) <= task.longest
    return TextReply(int32_bytes(ids) if fits else b"", len(ids), opens_reasoning=is_chat and opens_reasoning(text))


def _grammar(codec: TextCodec, wanted: Mapping[str, object], vocab_size: int) -> str:
    return checked_grammar(wanted, lambda: token_table(codec.vocabulary(vocab_size)))
