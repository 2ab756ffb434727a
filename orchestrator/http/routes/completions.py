"""POST /v1/completions: one prompt or several, as text or token ids."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import bad_request, error_of
from mgpu.orchestrator.http.edge.event_stream import KEEPALIVE, EventStream
from mgpu.orchestrator.http.requests.answers import (
    all_accepted,
    all_of,
    batches,
    total,
    unless_disconnected,
    usage_body,
)
from mgpu.orchestrator.http.requests.fields import MODEL, SAMPLING, Fields, Unsupported
from mgpu.orchestrator.http.requests.forms import ResponseFormat
from mgpu.orchestrator.http.requests.logprobs import text_logprobs
from mgpu.orchestrator.http.requests.rules import Maybe, Prompt, StreamOptions
from mgpu.orchestrator.http.routes.call import Call, event, text_json, to_json
from mgpu.protocol.client.async_stream import AsyncCompletionStream
from mgpu.protocol.client.requests.request_message import GenerateOptions
from mgpu.protocol.client.requests.results import Completion, Piece, Usage
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front.fields import Flag, Integer, Rule

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
RULES: dict[str, Rule] = {
    **SAMPLING,
    "model": MODEL,
    "prompt": Prompt(),
    "stream": Flag(),
    "stream_options": StreamOptions(),
    "logprobs": Maybe(Integer(0, 20), other=False),
    "echo": Flag(),
    "best_of": Integer(1, 16),
    "response_format": ResponseFormat(),
    "suffix": Unsupported("this server does not fill in the middle; leave suffix out", ("",)),
}


async def completions(call: Call) -> ASGIApp:
    """Continue prompts, whole or as a stream."""
    fields = await call.fields(RULES, "prompt")
    if fields.values.get("echo"):
        fields.values["echoed"] = await _texts(call, fields.values["prompt"])
    prompts, options = fields.values["prompt"], call.options(_options(fields))
    if fields.values.get("stream"):
        streams = [call.client.stream(prompt, **options) for prompt in prompts]
        accepted = await unless_disconnected(call.request, all_accepted(streams))
        return EventStream(_events(call, fields, streams, accepted[0].model), call.headers)
    work = all_of([call.client.generate(prompt, **options) for prompt in prompts])
    return call.json(_body(call, fields, await unless_disconnected(call.request, work)))


def _options(fields: Fields) -> GenerateOptions:
    values, options = fields.values, fields.options()
    options.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    if values.get("best_of", options.get("n", 1)) != options.get("n", 1):
        raise bad_request("best_of must be n or left out: this server returns all choices that it makes", "best_of")
    if values.get("logprobs") is not None:
        options["logprobs"] = values["logprobs"]
        if values.get("echo"):
            raise bad_request("echo with logprobs: this server has no log-probabilities of prompts", "echo")
    if "model" in values:
        options["model"] = values["model"]
    return options


def _body(call: Call, fields: Fields, completions: Sequence[Completion]) -> dict[str, Any]:
    n = fields.values.get("n", 1)
    choices = [
        {
            "index": at * n + choice.index,
            "text": _echoed(fields, at) + choice.text,
            "logprobs": text_logprobs(choice.logprobs, 0),
            "finish_reason": choice.finish_reason,
        }
        for at, completion in enumerate(completions)
        for choice in completion.choices
    ]
    return {
        "id": call.new_id("cmpl"),
        "object": "text_completion",
        "created": call.created,
        "model": completions[0].model,
        "choices": choices,
        "usage": usage_body(total([completion.usage for completion in completions])),
        "system_fingerprint": None,
    }


async def _texts(call: Call, prompts: Sequence[str | list[int]]) -> list[str]:
    return [each if isinstance(each, str) else await call.client.detokenize(each) for each in prompts]


def _echoed(fields: Fields, at: int) -> str:
    """Return what comes before the answer to a prompt: the prompt, if it was asked for."""
    return str(fields.values["echoed"][at]) if "echoed" in fields.values else ""


async def _events(
    call: Call, fields: Fields, streams: Sequence[AsyncCompletionStream], model: str
) -> AsyncGenerator[bytes, None]:
    head = {
        "id": call.new_id("cmpl"),
        "object": "text_completion",
        "created": call.created,
        "model": model,
        "system_fingerprint": None,
    }
    wants_usage = fields.values.get("stream_options", {}).get("include_usage", False)
    chunks = _Chunks({**head, "usage": None} if wants_usage else head, fields)
    usages: list[Usage] = []
    try:
        async for batch in batches(streams):
            if not batch:
                yield KEEPALIVE
                continue
            yield b"".join(chunks.of(at, piece) for at, piece in batch)
            usages += [piece.usage for _, piece in batch if piece.usage is not None]
        if wants_usage:
            yield event({**head, "choices": [], "usage": usage_body(total(usages))})
        yield b"data: [DONE]\n\n"
    except MgpuError as error:
        yield event(error_of(error).body())


class _Chunks:
    """Builds the chunks of one stream. What is the same in all of them is encoded once."""

    def __init__(self, head: dict[str, Any], fields: Fields) -> None:
        self._prefix = b"data: " + to_json(head)[:-1] + b',"choices":[{"index":'
        self._fields = fields
        self._offsets: dict[int, int] = {}
        """Length of the text of each choice so far."""

    def of(self, at: int, piece: Piece) -> bytes:
        """Return the chunk of a piece of the answer to prompt ``at``."""
        index = at * self._fields.values.get("n", 1) + piece.index
        offset = self._offsets.get(index)
        text = piece.text if offset is not None else _echoed(self._fields, at) + piece.text
        self._offsets[index] = (offset or 0) + len(piece.text)
        logprobs = b"null" if piece.logprobs is None else to_json(text_logprobs(piece.logprobs, offset or 0))
        rest = (text_json(text), logprobs, to_json(piece.finish_reason))
        return self._prefix + b'%d,"text":%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (index, *rest)
