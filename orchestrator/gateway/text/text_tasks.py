"""Do what a task asks of the tokenizer: in the gateway itself if the text is short, else in a process of its own."""

from mgpu.orchestrator.gateway.text.encoder_messages import TextReply, TextTask
from mgpu.orchestrator.gateway.text.text_queries import reply_to
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.fields import int32_bytes
from mgpu.protocol.front.server_messages import Tokenized


def do(codec: TextCodec, task: TextTask, vocab_size: int) -> TextReply:
    """Return the result. TokenizerError or ChatTemplateError when the text cannot be tokenized or rendered."""
    query = task.tokenize or task.detokenize
    if query is not None:
        reply = reply_to(codec, query, vocab_size)
        return TextReply(tokenized=reply) if isinstance(reply, Tokenized) else TextReply(detokenized=reply)
    is_chat = task.prompt is None
    text = codec.render_chat(task.messages or (), task.template_options) if task.prompt is None else task.prompt
    if (at_least := codec.least_tokens(text)) > task.longest:
        return TextReply(num_tokens=at_least, is_exact=False)
    ids = codec.encode(text, add_special_tokens=not is_chat)  # a template writes the special tokens itself
    return TextReply(int32_bytes(ids) if len(ids) <= task.longest else b"", len(ids))
