"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients expect them."""

from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import error_of
from mgpu.orchestrator.http.edge.event_stream import EventStream
from mgpu.orchestrator.http.requests.answers import all_accepted, batches, unless_disconnected
from mgpu.orchestrator.http.requests.anthropic_rules import (
    PROMPT_RULES,
    RULES,
    STOP_REASONS,
    messages_of,
    usage_body,
)
from mgpu.orchestrator.http.requests.fields import Fields
from mgpu.orchestrator.http.routes.call import Call, named_event
from mgpu.protocol.client.async_client import AsyncCompletionStream
from mgpu.protocol.client.request_message import GenerateOptions
from mgpu.protocol.client.results import Usage
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front.server_messages import Accepted


async def messages(call: Call) -> ASGIApp:
    """Answer messages, whole or as a stream."""
    fields = await call.fields(RULES, "messages", "max_tokens")
    chat, options = messages_of(fields.values), call.options(_options(fields))
    if fields.values.get("stream"):
        stream = call.client.stream_chat(chat, **options)
        [accepted] = await unless_disconnected(call.request, all_accepted([stream]))
        return EventStream(_events(call, stream, accepted), call.headers)
    completion = await unless_disconnected(call.request, call.client.chat(chat, **options))
    content = [{"type": "text", "text": completion.text}]
    body = _message(call, completion.model, content, usage_body(completion.usage))
    return call.json({**body, "stop_reason": STOP_REASONS.get(completion.finish_reason, "end_turn")})


async def count_tokens(call: Call) -> ASGIApp:
    """Return how many tokens messages have as a prompt."""
    values = (await call.fields(PROMPT_RULES, "messages")).values
    work = call.client.count_tokens(messages_of(values), template_options=values.get("chat_template_kwargs"))
    return call.json({"input_tokens": await unless_disconnected(call.request, work)})


def _options(fields: Fields) -> GenerateOptions:
    values, options = fields.values, fields.options()
    for theirs, ours in (("stop_sequences", "stop"), ("chat_template_kwargs", "template_options"), ("model", "model")):
        if theirs in values:
            options[ours] = values[theirs]  # type: ignore[literal-required]
    return options


def _message(call: Call, model: str, content: list[Any], usage: dict[str, int]) -> dict[str, Any]:
    return {
        "id": call.new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


async def _events(call: Call, stream: AsyncCompletionStream, accepted: Accepted) -> AsyncGenerator[bytes, None]:
    usage = Usage(accepted.prompt_tokens, 0, 0)
    reason = "end_turn"
    message = _message(call, accepted.model, [], usage_body(usage))
    block = {"type": "text", "text": ""}
    yield named_event("message_start", {"message": message})
    yield named_event("content_block_start", {"index": 0, "content_block": block})
    try:
        async for batch in batches([stream]):
            if not batch:
                yield named_event("ping", {})
            for _, piece in batch:
                if piece.text:
                    delta = {"type": "text_delta", "text": piece.text}
                    yield named_event("content_block_delta", {"index": 0, "delta": delta})
                usage, reason = piece.usage or usage, STOP_REASONS.get(piece.finish_reason or "", reason)
        yield named_event("content_block_stop", {"index": 0})
        delta = {"stop_reason": reason, "stop_sequence": None}  # type: ignore[dict-item]
        yield named_event("message_delta", {"delta": delta, "usage": usage_body(usage)})
        yield named_event("message_stop", {})
    except MgpuError as error:
        yield named_event("error", {"error": error_of(error).anthropic_body()["error"]})
