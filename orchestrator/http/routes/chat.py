"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import bad_request, error_of
from mgpu.orchestrator.http.edge.event_stream import KEEPALIVE, EventStream
from mgpu.orchestrator.http.requests.answers import all_accepted, batches, unless_disconnected, usage_body
from mgpu.orchestrator.http.requests.fields import (
    MODEL,
    SAMPLING,
    THINKING_BUDGET,
    Fields,
    Unsupported,
    add_chat_options,
)
from mgpu.orchestrator.http.requests.forms import ResponseFormat
from mgpu.orchestrator.http.requests.logprobs import chat_logprobs
from mgpu.orchestrator.http.requests.rules import Messages, StreamOptions
from mgpu.orchestrator.http.requests.tool_rules import ToolChoiceField, call_body, call_delta
from mgpu.orchestrator.http.routes.call import Call, event, text_json, to_json
from mgpu.protocol.client.async_stream import AsyncCompletionStream
from mgpu.protocol.client.requests.request_message import GenerateOptions
from mgpu.protocol.client.requests.results import Completion, CompletionChoice, Piece, Usage
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front.chat_messages import DOCUMENTS, TEMPLATE_OPTIONS, TOOLS
from mgpu.protocol.front.fields import INT32_MAX, Flag, Integer, Rule, Text

RULES: dict[str, Rule] = {
    **SAMPLING,
    "model": MODEL,
    "messages": Messages(),
    "max_completion_tokens": Integer(1, INT32_MAX),
    "stream": Flag(),
    "stream_options": StreamOptions(),
    "logprobs": Flag(),
    "top_logprobs": Integer(0, 20),
    "chat_template_kwargs": TEMPLATE_OPTIONS,
    "documents": DOCUMENTS,
    "reasoning_effort": Text(32),
    "thinking_token_budget": THINKING_BUDGET,
    "tools": TOOLS,
    "tool_choice": ToolChoiceField(),
    "parallel_tool_calls": Flag(),
    "response_format": ResponseFormat(),
    "functions": Unsupported("this form is obsolete; send tools", ([],)),
    "modalities": Unsupported("this server writes text only", (["text"],)),
    "audio": Unsupported("this server writes text only"),
}


async def chat_completions(call: Call) -> ASGIApp:
    """Answer chat messages, whole or as a stream."""
    fields = await call.fields(RULES, "messages")
    options = call.options(chat_options(fields))
    messages = fields.values["messages"]
    if fields.values.get("stream"):
        stream = call.client.stream_chat(messages, **options)
        [accepted] = await unless_disconnected(call.request, all_accepted([stream]))
        return EventStream(_events(call, fields, stream, accepted.model), call.headers)
    completion = await unless_disconnected(call.request, call.client.chat(messages, **options))
    return call.json(_body(call.new_id("chatcmpl"), call.created, completion))


def chat_options(fields: Fields) -> GenerateOptions:
    """Return the front channel's options for the fields of a chat."""
    values, options = fields.values, fields.options()
    if "max_completion_tokens" in values:
        options["max_tokens"] = values["max_completion_tokens"]
    if values.get("logprobs"):
        options["logprobs"] = values.get("top_logprobs", 0)
    elif values.get("top_logprobs"):
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    add_chat_options(values, options)
    return options


def _body(answer_id: str, created: int, completion: Completion) -> dict[str, Any]:
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": completion.model,
        "choices": [_choice(choice) for choice in completion.choices],
        "usage": usage_body(completion.usage),
        "system_fingerprint": None,
    }


def _choice(choice: CompletionChoice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": _message(choice),
        "logprobs": chat_logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _message(choice: CompletionChoice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [call_body(each) for each in choice.tool_calls]
    return message


async def _events(call: Call, fields: Fields, stream: AsyncCompletionStream, model: str) -> AsyncGenerator[bytes, None]:
    head = {
        "id": call.new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": call.created,
        "model": model,
        "system_fingerprint": None,
    }
    wants_usage = fields.values.get("stream_options", {}).get("include_usage", False)
    chunks = _Chunks(head, wants_usage)
    usage: Usage | None = None
    for index in range(fields.values.get("n", 1)):
        yield chunks.first(index)
    try:
        async for batch in batches([stream]):
            if not batch:
                yield KEEPALIVE
                continue
            yield b"".join(chunks.of(piece) for _, piece in batch)
            usage = batch[-1][1].usage or usage
        if wants_usage and usage is not None:
            yield event({**head, "choices": [], "usage": usage_body(usage)})
        yield b"data: [DONE]\n\n"
    except MgpuError as error:
        yield event(error_of(error).body())


class _Chunks:
    """Builds the chunks of one stream. What is the same in all of them is encoded once."""

    def __init__(self, head: dict[str, Any], wants_usage: bool) -> None:
        self._head = {**head, "usage": None} if wants_usage else head
        self._prefix = b"data: " + to_json(self._head)[:-1] + b',"choices":[{"index":'

    def first(self, index: int) -> bytes:
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def of(self, piece: Piece) -> bytes:
        """Return the chunk of a piece, and that of its end."""
        text = b""
        if piece.reasoning:
            text = self._chunk(piece.index, {"reasoning_content": piece.reasoning}, None, None)
        if piece.text and piece.logprobs is None:
            delta = b'"delta":{"content":%b},"logprobs":null,"finish_reason":null' % text_json(piece.text)
            text += self._prefix + b"%d,%b}]}\n\n" % (piece.index, delta)
        elif piece.text or piece.logprobs:
            text += self._chunk(piece.index, {"content": piece.text}, chat_logprobs(piece.logprobs), None)
        if calls := [call_delta(part) for part in piece.tool_calls if not part.is_broken]:
            text += self._chunk(piece.index, {"tool_calls": calls}, None, None)
        if piece.finish_reason is not None:
            text += self._chunk(piece.index, {}, None, piece.finish_reason)
        return text

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: object, reason: str | None) -> bytes:
        rest = to_json({"delta": delta, "logprobs": logprobs, "finish_reason": reason})
        return self._prefix + b"%d,%b]}\n\n" % (index, rest[1:])
