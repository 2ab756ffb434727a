"""The client for asyncio: the same methods as `Client`, awaited; streams are read with ``async for``.

    async with AsyncClient() as client:
        async for piece in client.stream("Once upon a time", max_tokens=64):
            print(piece.text, end="")

An AsyncClient belongs to the event loop in which it is first used; any number of tasks may share it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar, Unpack

import zmq

from mgpu.protocol.client.answer import Answer, answer_to
from mgpu.protocol.client.client import CONNECT_TIMEOUT_S, DEFAULT_TIMEOUT_S, LOOK_S, QUERY_TIMEOUT_S, SILENCE_TIMEOUT_S
from mgpu.protocol.client.connection import Connection, open_connection
from mgpu.protocol.client.requests import GenerateOptions, chat_map, generate_map
from mgpu.protocol.client.results import Completion, Piece
from mgpu.protocol.errors import DeadlineExceeded, MgpuError
from mgpu.protocol.front.client_messages import QueryKind
from mgpu.protocol.front.server_messages import Health, Models, Stats

R = TypeVar("R", Health, Stats, Models)


class AsyncCompletionStream(AsyncIterator[Piece]):
    """Iterate over the pieces of one answer. Closing it, or dropping it unfinished, cancels the request.

    The request is sent when the first piece is awaited.
    """

    def __init__(self, client: "AsyncClient", values: dict[str, object]) -> None:
        self._client = client
        self._values = values
        self._answer = answer_to(values)
        self._event = asyncio.Event()
        self._answer.notify = self._event.set
        self._deadline_s: float | None = None

    async def __anext__(self) -> Piece:
        """Wait for the next piece. RequestFailed, DeadlineExceeded or ServerUnreachable when there will be none."""
        answer = self._answer
        await self._begin()
        if not answer.pieces and not answer.done:
            await self._wait()
        if answer.pieces:
            return answer.pieces.popleft()
        if answer.error is not None:
            raise answer.error
        raise StopAsyncIteration

    async def completion(self) -> Completion:
        """Wait for the end and give the whole answer, whether or not pieces were taken."""
        try:
            await self._begin()
            while not self._answer.done:
                await self._wait()
                self._answer.pieces.clear()
        finally:
            await self.aclose()  # after an error or when the awaiting task is cancelled
        return self._answer.completion()

    async def aclose(self) -> None:
        """Cancel what is still to come; a second call does nothing."""
        self._client._cancel(self._answer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._client._cancel(self._answer)

    async def _begin(self) -> None:
        if self._deadline_s is None and not self._answer.done:
            timeout_s = self._values["timeout_s"]
            assert isinstance(timeout_s, (int, float))
            self._deadline_s = time.monotonic() + timeout_s
            await self._client._start(self._answer, self._values)

    async def _wait(self) -> None:
        """Wait until there is a piece or the end. DeadlineExceeded, after cancelling, when time is over."""
        assert self._deadline_s is not None
        answer, started_s = self._answer, time.monotonic()
        while not answer.pieces and not answer.done:
            now = time.monotonic()
            silence_s = max(started_s, answer.heard_s) + self._client.silence_timeout_s
            if now >= min(self._deadline_s, silence_s):
                await self.aclose()
                raise self._client._too_late(now >= self._deadline_s)
            self._event.clear()
            left_s = min(self._deadline_s, silence_s) - now
            await _wait_until(self._event, min(left_s, LOOK_S) if answer.is_adrift else left_s)
            if answer.is_adrift:
                self._client._read()


class AsyncClient:
    """A connection to one server, made when it is first needed. An async context manager."""

    def __init__(
        self,
        endpoint: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        keys: str | Path | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
    ) -> None:
        """See `Client`; nothing is connected before the first call."""
        self.silence_timeout_s = silence_timeout_s
        self._endpoint = endpoint
        self._keys = keys
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._open: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._progress = asyncio.Event()
        self._closed = False
        self._next_id = 1

    # ------------------------------------------------------------- requests

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """Continue ``prompt``, text or token ids, and give the whole answer. Options: messages.Generate."""
        values = generate_map(self._new_id(), prompt, False, **self._bounded(options))
        return await AsyncCompletionStream(self, values).completion()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncCompletionStream:
        """Continue ``prompt`` and give its pieces as they come."""
        return AsyncCompletionStream(self, generate_map(self._new_id(), prompt, True, **self._bounded(options)))

    async def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[GenerateOptions]) -> Completion:
        """Answer chat messages (maps with role and content) through the model's template."""
        values = chat_map(self._new_id(), messages, False, **self._bounded(options))
        return await AsyncCompletionStream(self, values).completion()

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], **options: Unpack[GenerateOptions]
    ) -> AsyncCompletionStream:
        """Answer chat messages and give the pieces as they come."""
        return AsyncCompletionStream(self, chat_map(self._new_id(), messages, True, **self._bounded(options)))

    async def health(self) -> Health:
        """Ask for the server's state."""
        return await self._query("health", Health)

    async def stats(self) -> dict[str, float]:
        """Ask for the engine's and the gateway's counters."""
        return (await self._query("stats", Stats)).counters

    async def models(self) -> list[dict[str, object]]:
        """List what is served: name, max_seq_len, vocab_size, chat."""
        return (await self._query("models", Models)).models

    async def close(self) -> None:
        """End everything in flight and close the socket; a second call does nothing."""
        self._closed = True
        self._disconnect()

    async def __aenter__(self) -> Self:
        await self._connection()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------- plumbing

    def _new_id(self) -> int:
        request_id, self._next_id = self._next_id, self._next_id + 1
        return request_id

    def _bounded(self, options: GenerateOptions) -> GenerateOptions:
        options.setdefault("timeout_s", self._timeout_s)
        return options

    def _disconnect(self) -> None:
        connection, self._open = self._open, None
        if connection is not None and self._loop is not None:
            for socket in (connection.socket, connection.monitor):
                self._loop.remove_reader(int(socket.getsockopt(zmq.FD)))
            connection.close()

    async def _connection(self) -> Connection:
        """Give the connection once its handshake is through. ServerUnreachable when that takes too long."""
        connection = self._opened()
        timeout_s = self.silence_timeout_s if connection.was_connected else self._connect_timeout_s
        deadline_s = time.monotonic() + timeout_s
        while not connection.connected:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or connection.refused is not None:
                what = f"did not answer within {timeout_s:g} s"
                error = connection.refused or connection.unreachable(what)
                if not connection.answers:
                    self._disconnect()  # the next call tries again
                raise error
            if connection.server_is_gone():
                raise connection.ended()
            await self._wait_for_progress(min(left_s, LOOK_S))
            self._read()
        return connection

    def _opened(self) -> Connection:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise MgpuError("the client is closed")
        if self._open is None:
            self._open, self._loop = open_connection(self._endpoint, self._keys), loop
            for socket in (self._open.socket, self._open.monitor):
                loop.add_reader(int(socket.getsockopt(zmq.FD)), self._read)
            self._read()
        if loop is not self._loop:
            raise MgpuError("an AsyncClient belongs to the event loop that used it first; make one per loop")
        return self._open

    def _read(self) -> None:
        """Handle what has arrived. A ZeroMQ descriptor only reports changes, so this also follows every send."""
        if self._open is not None and self._open.receive():
            self._progress.set()

    async def _start(self, answer: Answer, values: dict[str, object]) -> None:
        connection = await self._connection()
        connection.begin(answer, values)
        self._read()

    async def _query(self, kind: QueryKind, reply_type: type[R]) -> R:
        connection, request_id = await self._connection(), self._new_id()
        connection.send({"type": kind, "id": request_id})
        self._read()
        deadline_s = time.monotonic() + QUERY_TIMEOUT_S
        while True:
            reply = connection.take_reply(request_id)
            if isinstance(reply, reply_type):
                return reply
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not connection.connected:
                raise connection.unreachable("does not answer")
            await self._wait_for_progress(left_s)

    async def _wait_for_progress(self, seconds: float) -> None:
        self._progress.clear()
        await _wait_until(self._progress, seconds)

    def _cancel(self, answer: Answer) -> None:
        connection = self._open
        if answer.done or connection is None:
            return
        answer.done = True
        if connection.answers.pop(answer.id, None) is not None:
            connection.cancel(answer.id)
            self._read()

    def _too_late(self, over_deadline: bool) -> MgpuError:
        if over_deadline or self._open is None:
            return DeadlineExceeded("the answer was not complete within timeout_s; the request has been cancelled")
        return self._open.silent(self.silence_timeout_s)


async def _wait_until(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
