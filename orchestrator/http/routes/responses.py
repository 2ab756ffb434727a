"""POST /v1/responses: OpenAI's newer form of a chat, whole or as events. Nothing is stored."""

from collections.abc import AsyncGenerator
from itertools import count
from typing import Any

from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import error_of
from mgpu.orchestrator.http.edge.event_stream import KEEPALIVE, EventStream
from mgpu.orchestrator.http.requests.answers import all_accepted, batches, unless_disconnected
from mgpu.orchestrator.http.requests.fields import Fields
from mgpu.orchestrator.http.requests.response_rules import RULES, usage_body
from mgpu.orchestrator.http.routes.call import Call, named_event
from mgpu.protocol.client.async_client import AsyncCompletionStream
from mgpu.protocol.client.request_message import GenerateOptions
from mgpu.protocol.client.results import Usage
from mgpu.protocol.errors import MgpuError


async def responses(call: Call) -> ASGIApp:
    """Answer an input, whole or as a stream."""
    fields = await call.fields(RULES, "input")
    values, options = fields.values, call.options(_options(fields))
    chat = values["input"]
    if values.get("instructions"):
        chat = [{"role": "system", "content": values["instructions"]}, *chat]
    if values.get("stream"):
        stream = call.client.stream_chat(chat, **options)
        [accepted] = await unless_disconnected(call.request, all_accepted([stream]))
        return EventStream(_events(_Response(call, fields, accepted.model), stream), call.headers)
    completion = await unless_disconnected(call.request, call.client.chat(chat, **options))
    response = _Response(call, fields, completion.model)
    return call.json(response.ended(completion.text, completion.finish_reason, completion.usage))


def _options(fields: Fields) -> GenerateOptions:
    values, options = fields.values, fields.options()
    renamed = (("max_output_tokens", "max_tokens"), ("chat_template_kwargs", "template_options"), ("model", "model"))
    for theirs, ours in renamed:
        if theirs in values:
            options[ours] = values[theirs]  # type: ignore[literal-required]
    return options


class _Response:
    """The object of one response, in each state of its life."""

    def __init__(self, call: Call, fields: Fields, model: str) -> None:
        values = fields.values
        self.item_id = call.new_id("msg")
        self._fixed: dict[str, Any] = {
            "id": call.new_id("resp"),
            "object": "response",
            "created_at": call.created,
            "model": model,
            "instructions": values.get("instructions"),
            "max_output_tokens": values.get("max_output_tokens"),
            "metadata": values.get("metadata", {}),
            "temperature": values.get("temperature"),
            "top_p": values.get("top_p"),
            "background": False,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "text": {"format": (values.get("text") or {}).get("format") or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
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

    def ended(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        is_cut = reason == "length"
        return {
            **self._fixed,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "error": None,
            "output": [self.item(text, "incomplete" if is_cut else "completed")],
            "usage": usage_body(usage),
        }

    def failed(self, code: str, message: str) -> dict[str, Any]:
        return {**self.begun(), "status": "failed", "error": {"code": code, "message": message}}

    def item(self, text: str | None, status: str) -> dict[str, Any]:
        """Return the one item of the output; without content if ``text`` is None."""
        content = [] if text is None else [part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _events(response: _Response, stream: AsyncCompletionStream) -> AsyncGenerator[bytes, None]:
    numbers = count()
    place = {"item_id": response.item_id, "output_index": 0, "content_index": 0}

    def event(name: str, body: dict[str, Any]) -> bytes:
        return named_event(f"response.{name}", {"sequence_number": next(numbers), **body})

    texts: list[str] = []
    usage, reason = Usage(0, 0, 0), "stop"
    yield event("created", {"response": response.begun()})
    yield event("in_progress", {"response": response.begun()})
    yield event("output_item.added", {"output_index": 0, "item": response.item(None, "in_progress")})
    yield event("content_part.added", {**place, "part": part("")})
    try:
        async for batch in batches([stream]):
            if not batch:
                yield KEEPALIVE
            for _, piece in batch:
                if piece.text:
                    texts.append(piece.text)
                    yield event("output_text.delta", {**place, "delta": piece.text, "logprobs": []})
                usage, reason = piece.usage or usage, piece.finish_reason or reason
    except MgpuError as error:
        found = error_of(error)
        yield event("failed", {"response": response.failed(found.code or found.type, found.message)})
        return
    text = "".join(texts)
    ended = response.ended(text, reason, usage)
    yield event("output_text.done", {**place, "text": text, "logprobs": []})
    yield event("content_part.done", {**place, "part": part(text)})
    yield event("output_item.done", {"output_index": 0, "item": ended["output"][0]})
    yield event(ended["status"], {"response": ended})
