"""POST /v1/responses: OpenAI's newer form of a chat, whole or as events. Nothing is stored."""

from collections.abc import AsyncGenerator, Mapping
from itertools import count
from typing import Any

from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import error_of
from mgpu.orchestrator.http.edge.event_stream import KEEPALIVE, EventStream
from mgpu.orchestrator.http.requests.answers import all_accepted, batches, unless_disconnected
from mgpu.orchestrator.http.requests.fields import Fields
from mgpu.orchestrator.http.requests.response_items import OutputEvents, output_of
from mgpu.orchestrator.http.requests.response_rules import RULES, echoed, response_options, usage_body
from mgpu.orchestrator.http.routes.call import Call, named_event
from mgpu.protocol.client.async_stream import AsyncCompletionStream
from mgpu.protocol.client.requests.results import Usage
from mgpu.protocol.errors import MgpuError


async def responses(call: Call) -> ASGIApp:
    """Answer an input, whole or as a stream."""
    fields = await call.fields(RULES, "input")
    values, options = fields.values, call.options(response_options(fields.values, fields.options()))
    chat = values["input"]
    if values.get("instructions"):
        chat = [{"role": "system", "content": values["instructions"]}, *chat]
    if values.get("stream") or "logprobs" in options:
        stream = call.client.stream_chat(chat, **options)
        [accepted] = await unless_disconnected(call.request, all_accepted([stream]))
        response = _Response(call, fields, accepted.model)
        if values.get("stream"):
            return EventStream(_events(call, response, stream), call.headers)
        return call.json(await unless_disconnected(call.request, _with_logprobs(call, response, stream)))
    completion = await unless_disconnected(call.request, call.client.chat(chat, **options))
    output = output_of(completion, call.new_id)
    response = _Response(call, fields, completion.model)
    return call.json(response.ended(output, completion.finish_reason, completion.usage))


class _Response:
    """The object of one response, in each state of its life."""

    def __init__(self, call: Call, fields: Fields, model: str) -> None:
        self._fixed: dict[str, Any] = {
            "id": call.new_id("resp"),
            "object": "response",
            "created_at": call.created,
            "model": model,
            **echoed(fields.values),
            "background": False,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def begun(self) -> dict[str, Any]:
        rest: dict[str, Any] = {
            "status": "in_progress",
            "output": [],
            "usage": None,
            "error": None,
            "incomplete_details": None,
        }
        return {**self._fixed, **rest}

    def ended(self, output: list[dict[str, Any]], reason: str, usage: Usage) -> dict[str, Any]:
        is_cut = reason == "length"
        return {
            **self._fixed,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "error": None,
            "output": output,
            "usage": usage_body(usage),
        }

    def failed(self, code: str, message: str) -> dict[str, Any]:
        return {**self.begun(), "status": "failed", "error": {"code": code, "message": message}}


async def _with_logprobs(call: Call, response: _Response, stream: AsyncCompletionStream) -> dict[str, Any]:
    """Return a whole response. The pieces of a stream tell which tokens are text of the message."""
    items = OutputEvents(call.new_id, lambda name, body: b"")
    usage, reason = Usage(0, 0, 0), "stop"
    async for batch in batches([stream]):
        for _, piece in batch:
            items.of(piece)
            usage, reason = piece.usage or usage, piece.finish_reason or reason
    items.end(reason)
    return response.ended(items.output, reason, usage)


async def _events(call: Call, response: _Response, stream: AsyncCompletionStream) -> AsyncGenerator[bytes, None]:
    numbers = count()

    def event(name: str, body: Mapping[str, Any]) -> bytes:
        return named_event(f"response.{name}", {"sequence_number": next(numbers), **body})

    items = OutputEvents(call.new_id, event)
    usage, reason = Usage(0, 0, 0), "stop"
    yield event("created", {"response": response.begun()})
    yield event("in_progress", {"response": response.begun()})
    try:
        async for batch in batches([stream]):
            if not batch:
                yield KEEPALIVE
            for _, piece in batch:
                if data := items.of(piece):
                    yield data
                usage, reason = piece.usage or usage, piece.finish_reason or reason
    except MgpuError as error:
        found = error_of(error)
        yield event("failed", {"response": response.failed(found.code or found.type, found.message)})
        return
    yield items.end(reason)
    ended = response.ended(items.output, reason, usage)
    yield event(ended["status"], {"response": ended})
