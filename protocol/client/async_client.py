"""The client for asyncio: the same methods as `Client`, awaited; streams are read with ``async for``.

    async with AsyncClient() as client:
        async for piece in client.stream("Once upon a time", max_tokens=64):
            print(piece.text, end="")

Any number of tasks of one event loop may share an AsyncClient. In another loop, or after a fork, it connects anew.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Self, Unpack

import zmq

from mgpu.protocol.client import timeouts
from mgpu.protocol.client.connection import keep_inherited
from mgpu.protocol.client.request_message import GenerateOptions, generate_message, messages_field, prompt_field
from mgpu.protocol.client.results import Completion, Piece
from mgpu.protocol.client.resumable import ResumableRequest
from mgpu.protocol.client.session import Reply, Session
from mgpu.protocol.client.text_queries import (
    Prompt,
    TemplateOptions,
    detokenize_message,
    tokenize_message,
    wait_before_retry_s,
)
from mgpu.protocol.errors import MgpuError, RequestFailed
from mgpu.protocol.front.client_messages import QueryKind
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.server_messages import Detokenized, Health, Models, Stats, Tokenized


class AsyncCompletionStream(AsyncIterator[Piece]):
    """Iterate over the pieces of one answer. Closing it, or dropping it unfinished, cancels the request.

    The request is sent when the first piece is awaited.
    """

    def __init__(self, client: "AsyncClient", request: ResumableRequest, timeout_s: float) -> None:
        self._client = client
        self._request = request
        self._timeout_s = timeout_s
        self._deadline_s: float | None = None
        self._event = asyncio.Event()
        self._request.notify = self._event.set

    async def __anext__(self) -> Piece:
        """Wait for the next piece. RequestFailed, DeadlineExceeded or ServerUnreachable when there will be none."""
        answer = self._request.answer
        await self._begin()
        if not answer.pieces and not self._request.has_ended:
            await self._wait()
        if answer.pieces:
            return answer.pieces.popleft()
        if answer.error is not None:
            raise answer.error
        raise StopAsyncIteration

    async def completion(self) -> Completion:
        """Wait for the end and return the whole answer, whether or not pieces were taken."""
        try:
            await self._begin()
            while not self._request.has_ended:
                await self._wait()
                self._request.answer.pieces.clear()
        finally:
            await self.aclose()  # after an error or when the awaiting task is cancelled
        return self._request.answer.completion()

    async def aclose(self) -> None:
        """Cancel what is still to come; a second call does nothing."""
        self._client._cancel(self._request)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._client._cancel(self._request)

    async def _begin(self) -> None:
        if self._deadline_s is None and not self._request.has_ended:
            self._deadline_s = time.monotonic() + self._timeout_s
            await self._client._start(self._request)

    async def _wait(self) -> None:
        """Wait for a piece or the end. If time runs out, cancel the request and raise."""
        assert self._deadline_s is not None
        try:
            for seconds in self._client._waits_for(self._request, self._deadline_s):
                self._event.clear()
                await _wait_until(self._event, seconds)
                if self._request.is_interrupted or not self._event.is_set():
                    self._client._read()
        except MgpuError:
            await self.aclose()
            raise


class AsyncClient:
    """Talks to one server; connects when this is first needed. An async context manager.

    What happens when the connection is lost is told at `Client`.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout_s: float = timeouts.DEFAULT_TIMEOUT_S,
        *,
        keys: str | Path | None = None,
        connect_timeout_s: float = timeouts.CONNECT_TIMEOUT_S,
        silence_timeout_s: float = timeouts.SILENCE_TIMEOUT_S,
        retries: int = timeouts.RETRIES,
    ) -> None:
        """See `Client`; nothing is connected before the first call."""
        self._endpoint = endpoint
        self._keys = keys
        self._timeouts = timeouts.ClientTimeouts(timeout_s, connect_timeout_s, silence_timeout_s)
        self._ids = count(1)
        self._open: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._progress = asyncio.Event()
        self._retries = retries
        self._closed = False

    # ------------------------------------------------------------- requests

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """Continue ``prompt``, text or token ids, and return the whole answer. Options: see request_message.py."""
        return await self._stream(prompt_field(prompt), options, stream=False).completion()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncCompletionStream:
        """Continue ``prompt`` and return an iterator over its pieces as they come."""
        return self._stream(prompt_field(prompt), options, stream=True)

    async def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[GenerateOptions]) -> Completion:
        """Answer chat messages (maps with role and content) through the model's template."""
        return await self._stream(messages_field(messages), options, stream=False).completion()

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], **options: Unpack[GenerateOptions]
    ) -> AsyncCompletionStream:
        """Answer chat messages and return an iterator over the pieces as they come."""
        return self._stream(messages_field(messages), options, stream=True)

    async def count_tokens(self, prompt: Prompt, *, template_options: TemplateOptions = None) -> int:
        """Return how many prompt tokens a request with ``prompt``, text or chat messages, would have."""
        message = tokenize_message(prompt, "count", template_options)
        return (await self._ask_text(message, Tokenized)).num_tokens or 0

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool = True, template_options: TemplateOptions = None
    ) -> list[int]:
        """Return the token ids that a request with ``prompt``, text or chat messages, would have.

        Without ``add_special_tokens`` a text gets no beginning-of-sequence token.
        """
        message = tokenize_message(prompt, "token_ids", template_options, add_special_tokens)
        return int32_array((await self._ask_text(message, Tokenized)).token_ids or b"").tolist()

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``token_ids``."""
        return (await self._ask_text(detokenize_message(token_ids, skip_special_tokens), Detokenized)).text

    async def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, template_options: TemplateOptions = None
    ) -> str:
        """Return the text that the model's chat template makes of ``messages``."""
        return (await self._ask_text(tokenize_message(messages, "text", template_options), Tokenized)).text or ""

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
        await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------- plumbing

    def _stream(self, what: Mapping[str, object], options: GenerateOptions, *, stream: bool) -> AsyncCompletionStream:
        timeout_s = options.get("timeout_s", self._timeouts.request_s)
        message = generate_message(next(self._ids), what, options, stream=stream, timeout_s=timeout_s)
        return AsyncCompletionStream(self, ResumableRequest(message, self._retries), timeout_s)

    async def _start(self, request: ResumableRequest) -> None:
        session = await self._connect()
        session.begin(request)
        self._read()

    async def _query(self, kind: QueryKind, reply_type: type[Reply]) -> Reply:
        return await self._ask({"type": kind, "id": next(self._ids)}, reply_type)

    async def _ask_text(self, message: Mapping[str, object], reply_type: type[Reply]) -> Reply:
        timeout_s, silence_s = self._timeouts.request_s, self._timeouts.silence_s
        deadline_s, retries_left = time.monotonic() + timeout_s, self._retries
        while True:
            try:
                asked = {**message, "id": next(self._ids)}
                return await self._ask(asked, reply_type, silence_s, deadline_s - time.monotonic())
            except RequestFailed as error:
                await asyncio.sleep(wait_before_retry_s(error, retries_left, deadline_s))
                retries_left -= 1

    async def _ask(self, message: Mapping[str, object], reply_type: type[Reply], *waits_s: float) -> Reply:
        session = await self._connect()
        query_id = session.ask(message)
        try:
            self._read()
            await self._wait(timeouts.until_reply(session, query_id, *waits_s))
            return session.take_reply(query_id, reply_type)
        finally:
            if session is self._open:  # else it is closed
                session.forget(query_id)

    async def _connect(self) -> Session:
        """Return the session once the server is connected, the first time or after a disconnection."""
        session = self._opened()
        try:
            await self._wait(timeouts.until_connected(session, self._timeouts))
        except MgpuError:
            if not session.requests and not session.channel.server_has_ended():
                self._disconnect()  # the next call tries again
            raise
        return session

    def _opened(self) -> Session:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise MgpuError("the client is closed")
        if loop is not self._loop:
            self._leave_loop()
        if self._open is None:
            self._open, self._loop, self._pid = Session(self._endpoint, self._keys), loop, os.getpid()
            self._progress = asyncio.Event()
            for fd in self._fds(self._open):
                loop.add_reader(fd, self._read)
            self._read()
        return self._open

    def _leave_loop(self) -> None:
        """Forget the event loop of earlier calls. MgpuError if it still runs."""
        if self._open is not None and self._pid == os.getpid() and self._loop is not None and self._loop.is_running():
            raise MgpuError("this AsyncClient is in use in another event loop, which still runs; make one per loop")
        self._disconnect()

    def _disconnect(self) -> None:
        session, self._open = self._open, None
        if session is None or self._loop is None:
            return
        if self._pid != os.getpid():
            keep_inherited(session)
            return
        if not self._loop.is_closed():
            for fd in self._fds(session):
                self._loop.remove_reader(fd)
        session.close()

    def _fds(self, session: Session) -> list[int]:
        return [int(socket.getsockopt(zmq.FD)) for socket in (session.channel.socket, session.channel.monitor)]

    def _read(self) -> None:
        """Handle what has arrived. A ZeroMQ descriptor only reports changes, so this also follows every send."""
        if self._open is not None and self._open.receive():
            self._progress.set()

    async def _wait(self, waits: Iterable[float]) -> None:
        """Wait until ``waits`` ends. It yields how long to poll next; see timeouts.py."""
        for seconds in waits:
            self._progress.clear()
            await _wait_until(self._progress, seconds)
            self._read()

    def _waits_for(self, request: ResumableRequest, deadline_s: float) -> Iterable[float]:
        return timeouts.until_progress(self._opened(), request, deadline_s, self._timeouts)

    def _cancel(self, request: ResumableRequest) -> None:
        if self._open is not None and not request.has_ended and self._pid == os.getpid():
            self._open.cancel(request)
            self._read()


async def _wait_until(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
