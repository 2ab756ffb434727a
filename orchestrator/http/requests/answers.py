"""The answers to one HTTP request: one stream of the front channel for each of its prompts."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from mgpu.orchestrator.http.edge.errors import CLIENT_CLOSED_STATUS, HttpError
from mgpu.orchestrator.http.edge.event_stream import KEEPALIVE_S, until_disconnect
from mgpu.protocol.client.async_stream import AsyncCompletionStream
from mgpu.protocol.client.requests.results import Piece, Usage
from mgpu.protocol.front.server_messages import Accepted

T = TypeVar("T")
NumberedPiece = tuple[int, Piece]
"""The number of the prompt, and a piece of its answer."""


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Wait for ``work``; cancel it when the client closes the connection. The body must have been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(until_disconnect(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HttpError(CLIENT_CLOSED_STATUS, "the client closed the connection")
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        with contextlib.suppress(BaseException):
            await working


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all; if one fails, cancel the others and raise its error."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_accepted(streams: Sequence[AsyncCompletionStream]) -> list[Accepted]:
    """Send all requests and wait until each is accepted. If one fails, end the others."""
    try:
        return await all_of([stream.accepted() for stream in streams])
    except BaseException:
        await close(streams)
        raise


async def close(streams: Sequence[AsyncCompletionStream]) -> None:
    """Cancel what is still to come."""
    for stream in streams:
        await stream.aclose()


async def batches(streams: Sequence[AsyncCompletionStream]) -> AsyncGenerator[list[NumberedPiece], None]:
    """Yield pieces as they come, several at once if they have; an empty list after a while without any.

    All streams are closed at the end, also if the caller stops early.
    """
    try:
        if len(streams) == 1:
            while (pieces := await streams[0].take(KEEPALIVE_S)) or not streams[0].has_ended:
                yield [(0, piece) for piece in pieces]
        else:
            async for batch in _merged(streams):
                yield batch
    finally:
        await close(streams)


async def _merged(streams: Sequence[AsyncCompletionStream]) -> AsyncGenerator[list[NumberedPiece], None]:
    waiting: dict[asyncio.Task[list[Piece]], int] = {}
    try:
        for at, stream in enumerate(streams):
            waiting[asyncio.create_task(stream.take(KEEPALIVE_S))] = at
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            batch: list[NumberedPiece] = []
            for task in done:
                at, pieces = waiting.pop(task), task.result()
                batch += [(at, piece) for piece in pieces]
                if pieces or not streams[at].has_ended:  # the error of a stream comes after its pieces
                    waiting[asyncio.create_task(streams[at].take(KEEPALIVE_S))] = at
            if batch or waiting:
                yield batch
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def total(usages: Sequence[Usage]) -> Usage:
    """Add up what several prompts have used."""
    return Usage(
        sum(each.prompt_tokens for each in usages),
        sum(each.completion_tokens for each in usages),
        sum(each.cached_tokens for each in usages),
    )


def usage_body(usage: Usage) -> dict[str, object]:
    """Return OpenAI's form."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
