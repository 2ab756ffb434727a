"""The client for asyncio: the same methods as `Client`, awaited; streams are read with ``async for``.

    async with AsyncClient() as client:
        async for piece in client.stream("Once upon a time", max_tokens=64):
            print(piece.text, end="")

Any number of tasks of one event loop may share an AsyncClient. In another loop, or after a fork, it connects anew.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload

from mgpu.protocol.client.async_stream import AsyncCompletionStream
from mgpu.protocol.client.backlog import Backlogs, UnreadBounds
from mgpu.protocol.client.requests.answer import Answer
from mgpu.protocol.client.requests.many import (
    MAX_IN_FLIGHT,
    Answers,
    AnyPrompt,
    Chat,
    ManyPrompts,
    OnePrompt,
    Progress,
    any_field,
    are_many,
    are_many_chats,
)
from mgpu.protocol.client.requests.option_help import with_options
from mgpu.protocol.client.requests.request_message import GenerateOptions, chat_fields, generate_message, prompt_field
from mgpu.protocol.client.requests.results import Completion
from mgpu.protocol.client.text_queries import (
    Prompt,
    TemplateOptions,
    Tools,
    detokenize_message,
    tokenize_message,
    wait_before_retry_s,
)
from mgpu.protocol.client.transport import timeouts
from mgpu.protocol.client.transport.async_connection import AsyncConnection
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.client.transport.session import Reply
from mgpu.protocol.client.transport.window import Window
from mgpu.protocol.errors import MgpuError, RequestFailed
from mgpu.protocol.front.client_messages import QueryKind
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.server_messages import Detokenized, Health, Models, Stats, Tokenized
from mgpu.protocol.keys import ClientKeys


class AsyncClient:
    """Talks to one server; connects when this is first needed. An async context manager.

    What happens when the connection is lost is told at `Client`.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout_s: float = timeouts.DEFAULT_TIMEOUT_S,
        *,
        keys: str | Path | ClientKeys | None = None,
        connect_timeout_s: float = timeouts.CONNECT_TIMEOUT_S,
        silence_timeout_s: float = timeouts.SILENCE_TIMEOUT_S,
        retries: int = timeouts.RETRIES,
        unread_bounds: UnreadBounds | None = None,
        window: Window | None = None,
    ) -> None:
        """See `Client`; nothing is connected before the first call.

        ``unread_bounds`` are for a server that passes streams on to readers of its own: they fail with `slow_reader`
        beyond these bounds, and have no `completion`, because pieces are not kept once they were taken.
        ``window`` says which of many requests is sent next.
        """
        self._timeouts = timeouts.ClientTimeouts(timeout_s, connect_timeout_s, silence_timeout_s)
        self._connection = AsyncConnection(endpoint, keys, self._timeouts, window)
        self._backlogs = Backlogs(unread_bounds, self._connection.cancel_soon) if unread_bounds else None
        self._retries = retries
        self._ids = count(1)

    # ------------------------------------------------------------- requests

    @overload
    async def generate(self, prompt: OnePrompt, **options: Unpack[GenerateOptions]) -> Completion: ...

    @overload
    async def generate(self, prompt: ManyPrompts, **options: Unpack[GenerateOptions]) -> list[Completion]: ...

    @with_options
    async def generate(self, prompt: Any, **options: Unpack[GenerateOptions]) -> Completion | list[Completion]:
        """Continue ``prompt``, text or token ids, and return the whole answer.

        A list of prompts gets the list of their answers; `map` can do more.
        """
        if are_many(prompt):
            return await self.map(prompt, **options)
        return await self._stream(prompt_field(prompt), options, stream=False).completion()

    @with_options
    def stream(self, prompt: OnePrompt, **options: Unpack[GenerateOptions]) -> AsyncCompletionStream:
        """Continue ``prompt`` and return an iterator over its pieces as they come."""
        return self._stream(prompt_field(prompt), options, stream=True)

    @overload
    async def chat(self, messages: Chat, **options: Unpack[GenerateOptions]) -> Completion: ...

    @overload
    async def chat(self, messages: Sequence[Chat], **options: Unpack[GenerateOptions]) -> list[Completion]: ...

    @with_options
    async def chat(self, messages: Any, **options: Unpack[GenerateOptions]) -> Completion | list[Completion]:
        """Answer chat messages (maps with role and content) through the model's template.

        The answer's reasoning and tool calls are apart from its text; its `message` continues the chat.
        A list of chats gets the list of their answers; `map` can do more.
        """
        if are_many_chats(messages):
            return await self.map(messages, **options)
        return await self._stream(chat_fields(messages), options, stream=False).completion()

    @with_options
    def stream_chat(self, messages: Chat, **options: Unpack[GenerateOptions]) -> AsyncCompletionStream:
        """Answer chat messages and return an iterator over the pieces as they come."""
        return self._stream(chat_fields(messages), options, stream=True)

    @overload
    async def map(
        self,
        prompts: Iterable[AnyPrompt],
        *,
        max_in_flight: int = ...,
        on_progress: Progress | None = ...,
        return_exceptions: Literal[False] = ...,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    async def map(
        self,
        prompts: Iterable[AnyPrompt],
        *,
        max_in_flight: int = ...,
        on_progress: Progress | None = ...,
        return_exceptions: bool,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion | MgpuError]: ...

    @with_options
    async def map(
        self,
        prompts: Iterable[AnyPrompt],
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        on_progress: Progress | None = None,
        return_exceptions: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Answer many prompts, each text, token ids or chat messages, and return the answers in their order.

        At most ``max_in_flight`` requests run at the same time. ``on_progress(done, total)`` is called after each
        answer. The first error ends all of it; with ``return_exceptions`` it takes the place of its answer.
        """
        answers = Answers(prompts, max_in_flight, on_progress, return_exceptions)
        workers = [asyncio.create_task(self._work(answers, options)) for _ in range(answers.max_in_flight)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return answers.in_order()

    async def count_tokens(
        self, prompt: Prompt, *, template_options: TemplateOptions = None, tools: Tools = None
    ) -> int:
        """Return how many prompt tokens a request with ``prompt``, text or chat messages, would have."""
        message = tokenize_message(prompt, "count", template_options, tools=tools)
        return (await self._ask_text(message, Tokenized)).num_tokens or 0

    async def tokenize(
        self,
        prompt: Prompt,
        *,
        add_special_tokens: bool = True,
        template_options: TemplateOptions = None,
        tools: Tools = None,
    ) -> list[int]:
        """Return the token ids that a request with ``prompt``, text or chat messages, would have.

        Without ``add_special_tokens`` a text gets no beginning-of-sequence token.
        """
        message = tokenize_message(prompt, "token_ids", template_options, add_special_tokens, tools)
        return int32_array((await self._ask_text(message, Tokenized)).token_ids or b"").tolist()

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``token_ids``."""
        return (await self._ask_text(detokenize_message(token_ids, skip_special_tokens), Detokenized)).text

    async def apply_chat_template(
        self, messages: Chat, *, template_options: TemplateOptions = None, tools: Tools = None, documents: Tools = None
    ) -> str:
        """Return the text that the model's chat template makes of ``messages``."""
        return (
            await self._ask_text(
                tokenize_message(messages, "text", template_options, tools=tools, documents=documents), Tokenized
            )
        ).text or ""

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
        self._connection.close()

    async def __aenter__(self) -> Self:
        await self._connection.connect(self._timeouts.request_s)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._connection.endpoint!r}{', closed' if self._connection.is_closed else ''})"

    # ------------------------------------------------------------- plumbing

    def _stream(self, what: Mapping[str, object], options: GenerateOptions, *, stream: bool) -> AsyncCompletionStream:
        named_s = options.get("timeout_s")
        timeout_s = self._timeouts.request_s if named_s is None else named_s
        message = generate_message(next(self._ids), what, options, stream=stream, timeout_s=timeout_s)
        backlogs = self._backlogs if stream else None
        request = ResumableRequest(message, self._retries, Answer(message, is_passed_on=backlogs is not None))
        return AsyncCompletionStream(self._connection, request, timeout_s, backlogs)

    async def _work(self, answers: Answers, options: GenerateOptions) -> None:
        """Answer one prompt after the other until there are no more."""
        for number, prompt in answers.next_prompts():
            try:
                completion = await self._stream(any_field(prompt), options, stream=False).completion()
                answers.add(number, completion)
            except MgpuError as error:
                answers.fail(number, error)

    async def _query(self, kind: QueryKind, reply_type: type[Reply]) -> Reply:
        return await self._connection.ask({"type": kind, "id": next(self._ids)}, reply_type)

    async def _ask_text(self, message: Mapping[str, object], reply_type: type[Reply]) -> Reply:
        deadline_s, retries_left = time.monotonic() + self._timeouts.request_s, self._retries
        while True:
            try:
                asked, left_s = {**message, "id": next(self._ids)}, deadline_s - time.monotonic()
                return await self._connection.ask(asked, reply_type, self._timeouts.silence_s, left_s)
            except RequestFailed as error:
                await asyncio.sleep(wait_before_retry_s(error, retries_left, deadline_s))
                retries_left -= 1
