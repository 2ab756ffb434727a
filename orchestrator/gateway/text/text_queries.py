"""Answer tokenize and detokenize: what a prompt becomes before the model sees it, and the text of token ids."""

from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.client_messages import Detokenize, Generate, TextQuery, Tokenize
from mgpu.protocol.front.fields import int32_array, int32_bytes
from mgpu.protocol.front.server_messages import Detokenized, Tokenized

MAX_REPLY_BYTES = 1 << 20
"""As much as a client's message may have; what is longer could not be sent back as a prompt either."""


def as_request(query: TextQuery) -> Generate:
    """Return the request with the same prompt: a query is counted, queued, cancelled and timed as this request is."""
    if isinstance(query, Detokenize):
        return Generate(query.id, prompt_ids=query.token_ids, model=query.model, timeout_s=query.timeout_s)
    return Generate(
        query.id,
        prompt=query.prompt,
        messages=query.messages,
        tools=query.tools,
        documents=query.documents,
        template_options=query.template_options,
        model=query.model,
        timeout_s=query.timeout_s,
    )


def reply_to(codec: TextCodec, query: TextQuery, vocab_size: int) -> Tokenized | Detokenized:
    """Do the work. TokenizerError or ChatTemplateError when the text cannot be tokenized, rendered or sent back."""
    if isinstance(query, Detokenize):
        return Detokenized(query.id, _text_of(codec, query, vocab_size))
    if query.returns == "text":
        text = codec.render_chat(chat_of(query))
        _check_size("the rendered chat", len(text.encode()), "the count only")
        return Tokenized(query.id, text=text)
    ids = _ids_of(codec, query)
    if query.returns == "count":
        return Tokenized(query.id, len(ids))
    _check_size(f"an answer of {len(ids)} token ids", 4 * len(ids), "the count only")
    return Tokenized(query.id, len(ids), int32_bytes(ids))


def _ids_of(codec: TextCodec, query: Tokenize) -> list[int]:
    if query.prompt is not None:
        return codec.encode(query.prompt, query.add_special_tokens)
    return codec.encode_chat(chat_of(query))


def chat_of(request: Generate | Tokenize) -> ChatPrompt:
    """Return what the template gets of a request. Tools that must not be called are not shown to the model."""
    may_call = not isinstance(request, Generate) or request.tool_choice != "none"
    tools = request.tools if may_call else None
    return ChatPrompt(request.messages or (), tools, request.documents, request.template_options)


def _text_of(codec: TextCodec, query: Detokenize, vocab_size: int) -> str:
    ids = int32_array(query.token_ids).tolist()
    if (highest := max(ids)) >= vocab_size:
        raise TokenizerError(f"token_ids has token id {highest}; the vocabulary has ids 0 to {vocab_size - 1}")
    size = sum(len(codec.all_bytes(token_id)) for token_id in ids)  # before the text is made: a piece may be long
    _check_size("the text", size, "fewer token ids at once")
    return codec.decode(ids, query.skip_special_tokens)


def _check_size(what: str, size: int, instead: str) -> None:
    if size > MAX_REPLY_BYTES:
        raise TokenizerError(f"{what} has {size} bytes, the limit is {MAX_REPLY_BYTES}; ask for {instead}")
