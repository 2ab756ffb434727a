"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients expect them."""

from collections.abc import AsyncGenerator
from itertools import takewhile
from typing import Any

from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import error_of
from mgpu.orchestrator.http.edge.event_stream import EventStream
from mgpu.orchestrator.http.requests.answers import all_accepted, batches, unless_disconnected
from mgpu.orchestrator.http.requests.anthropic_rules import (
    PROMPT_RULES,
    RULES,
    add_anthropic_options,
    messages_of,
    stop_body,
    usage_body,
)
from mgpu.orchestrator.http.requests.fields import Fields
from mgpu.orchestrator.http.routes.call import Call, named_event
from mgpu.orchestrator.http.routes.models import checked_model
from mgpu.protocol.client.async_stream import AsyncCompletionStream
from mgpu.protocol.client.requests.request_message import GenerateOptions
from mgpu.protocol.client.requests.results import Completion, Piece, ToolCallPart, Usage
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front.server_messages import Accepted


async def messages(call: Call) -> ASGIApp:
    """Answer messages, whole or as a stream."""
    fields = await call.fields(RULES, "messages", "max_tokens")
    chat, options = messages_of(fields.values), call.options(_options(fields))
    if fields.values.get("stream"):
        stream = call.client.stream_chat(chat, **options)
        [accepted] = await unless_disconnected(call.request, all_accepted([stream]))
        return EventStream(_events(call, stream, accepted, bool(fields.values.get("thinking"))), call.headers)
    completion = await unless_disconnected(call.request, call.client.chat(chat, **options))
    content = _content(completion, bool(fields.values.get("thinking")))
    body = _message(call, completion.model, content, usage_body(completion.usage))
    return call.json({**body, **stop_body(completion.finish_reason, completion.stop_string)})


async def count_tokens(call: Call) -> ASGIApp:
    """Return how many tokens messages have as a prompt."""
    values = (await call.fields(PROMPT_RULES, "messages")).values
    await checked_model(call, values.get("model"))
    options: GenerateOptions = {}
    add_anthropic_options(values, options)
    work = call.client.count_tokens(
        messages_of(values), template_options=options["template_options"], tools=values.get("tools")
    )
    return call.json({"input_tokens": await unless_disconnected(call.request, work)})


def _options(fields: Fields) -> GenerateOptions:
    values, options = fields.values, fields.options()
    if "stop_sequences" in values:
        options["stop"] = values["stop_sequences"]
    add_anthropic_options(values, options)
    return options


def _content(completion: Completion, shows_reasoning: bool) -> list[dict[str, Any]]:
    """Return the blocks of an answer: reasoning if it was asked for, text, calls."""
    blocks: list[dict[str, Any]] = []
    if completion.reasoning and shows_reasoning:
        blocks.append({"type": "thinking", "thinking": completion.reasoning, "signature": ""})
    if completion.text or not completion.tool_calls:
        blocks.append({"type": "text", "text": completion.text})
    calls = completion.tool_calls
    return blocks + [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments} for call in calls]


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


async def _events(
    call: Call, stream: AsyncCompletionStream, accepted: Accepted, shows_reasoning: bool
) -> AsyncGenerator[bytes, None]:
    usage = Usage(accepted.prompt_tokens, 0, 0)
    stop = stop_body("stop", None)
    message = _message(call, accepted.model, [], usage_body(usage))
    blocks = _Blocks()
    yield named_event("message_start", {"message": message})
    try:
        async for batch in batches([stream]):
            if not batch:
                yield named_event("ping", {})
            for _, piece in batch:
                if data := blocks.of(piece, shows_reasoning):
                    yield data
                usage = piece.usage or usage
                if piece.finish_reason is not None:
                    stop = stop_body(piece.finish_reason, piece.stop_string)
        yield blocks.end()
        yield named_event("message_delta", {"delta": stop, "usage": usage_body(usage)})
        yield named_event("message_stop", {})
    except MgpuError as error:
        yield named_event("error", {"error": error_of(error).anthropic_body()["error"]})


_EMPTY_BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class _Blocks:
    """The events of the content blocks of a stream. One block is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""
        """The kind of the open block, or the number of its call."""

    def of(self, piece: Piece, shows_reasoning: bool) -> bytes:
        """Return the events of a piece."""
        # Parts of a call that has begun in an earlier piece come first: the call ends before the text.
        begun = list(takewhile(lambda part: not part.id, piece.tool_calls))
        data = b"".join(map(self.add_call, begun))
        if piece.reasoning and shows_reasoning:
            data += self.add("thinking", {"type": "thinking_delta", "thinking": piece.reasoning})
        if piece.text:
            data += self.add("text", {"type": "text_delta", "text": piece.text})
        return data + b"".join(map(self.add_call, piece.tool_calls[len(begun) :]))

    def add(self, kind: str, delta: dict[str, Any]) -> bytes:
        """Add to the block of this kind; another one is closed first."""
        head = b"" if self._open == kind else self._begin(kind, _EMPTY_BLOCKS[kind])
        return head + self._delta(delta)

    def add_call(self, part: ToolCallPart) -> bytes:
        """Add a part of a call."""
        head = b""
        if part.id:
            block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
            head = self._begin(f"call {part.index}", block)
        return head + (
            self._delta({"type": "input_json_delta", "partial_json": part.arguments}) if part.arguments else b""
        )

    def end(self) -> bytes:
        """Close the last block; an answer has one at least."""
        head = self._begin("text", _EMPTY_BLOCKS["text"]) if self._index < 0 else b""
        return head + named_event("content_block_stop", {"index": self._index})

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        closed = named_event("content_block_stop", {"index": self._index}) if self._open else b""
        self._open, self._index = kind, self._index + 1
        return closed + named_event("content_block_start", {"index": self._index, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named_event("content_block_delta", {"index": self._index, "delta": delta})
