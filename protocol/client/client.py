"""The client: `with Client() as client: print(client.generate("The capital of France is").text)`.

Everything streams on one socket, so that any number of answers can be read in turns:

    streams = [client.stream(prompt, max_tokens=64) for prompt in prompts]

Any number of threads may share a client, and so may processes that fork: connection.py says how.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload

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
from mgpu.protocol.client.stream import CompletionStream
from mgpu.protocol.client.text_queries import (
    Prompt,
    TemplateOptions,
    Tools,
    detokenize_message,
    tokenize_message,
    wait_before_retry_s,
)
from mgpu.protocol.client.transport import timeouts
from mgpu.protocol.client.transport.connection import Connection, ProcessConnections
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.client.transport.session import Reply, Session
from mgpu.protocol.discovery import ServerFinder
from mgpu.protocol.errors import MgpuError, RequestFailed
from mgpu.protocol.front.client_messages import QueryKind
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.server_messages import Detokenized, Health, Models, Stats, Tokenized


class Client:
    """Talks to one server. A context manager; `close` ends everything in flight.

    If the gateway dies, the client connects to the next one and answers go on, within their deadline and if the next
    one comes within ``silence_timeout_s``. If the server itself ends, its requests fail; a client without a named
    endpoint looks for the server again at its next request. If only the connection breaks, the server ends its requests
    when it next sends to it; only a request that the client has resumed before goes on.
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
        """Connect to ``endpoint``, else to MGPU_ENDPOINT, else to the server that runs on this machine.

        ``timeout_s`` is the longest a request may take unless the call says otherwise. ``keys`` is this client's key
        file, else MGPU_KEYS, for servers on tcp that want one. ServerUnreachable when nobody answers within
        ``connect_timeout_s``, or ``timeout_s`` if that is shorter, or the server and this client do not accept each
        other's keys. A request that an overloaded server refuses is sent again after its ``retry_after_s``, ``retries``
        times at most; 0 turns it off.
        """
        self._arguments = endpoint, timeout_s, keys, connect_timeout_s, silence_timeout_s, retries
        self._timeouts = timeouts.ClientTimeouts(timeout_s, connect_timeout_s, silence_timeout_s)
        self._server = ServerFinder(endpoint)
        self._keys = keys
        self._retries = retries
        self._closed = False
        self._ids = count(1)
        self._processes: dict[int, ProcessConnections] = {}
        """The connections of each process: this one, and its parents if it was forked."""
        self._connection(timeout_s)

    def __reduce__(self) -> tuple[object, ...]:
        """Make a copy, and what a spawned process gets, a client of its own with the same arguments."""
        return _client_of, self._arguments

    # ------------------------------------------------------------- requests

    @overload
    def generate(self, prompt: OnePrompt, **options: Unpack[GenerateOptions]) -> Completion: ...

    @overload
    def generate(self, prompt: ManyPrompts, **options: Unpack[GenerateOptions]) -> list[Completion]: ...

    @with_options
    def generate(self, prompt: Any, **options: Unpack[GenerateOptions]) -> Completion | list[Completion]:
        """Continue ``prompt``, text or token ids, and return the whole answer.

        A list of prompts gets the list of their answers; `map` can do more.
        """
        if are_many(prompt):
            return self.map(prompt, **options)
        with self._begin(prompt_field(prompt), options, stream=False) as stream:
            return stream.completion()

    @with_options
    def stream(self, prompt: OnePrompt, **options: Unpack[GenerateOptions]) -> CompletionStream:
        """Continue ``prompt`` and return an iterator over its pieces as they come."""
        return self._begin(prompt_field(prompt), options, stream=True)

    @overload
    def chat(self, messages: Chat, **options: Unpack[GenerateOptions]) -> Completion: ...

    @overload
    def chat(self, messages: Sequence[Chat], **options: Unpack[GenerateOptions]) -> list[Completion]: ...

    @with_options
    def chat(self, messages: Any, **options: Unpack[GenerateOptions]) -> Completion | list[Completion]:
        """Answer chat messages (maps with role and content) through the model's template.

        The answer's reasoning and tool calls are apart from its text; its `message` continues the chat.
        A list of chats gets the list of their answers; `map` can do more.
        """
        if are_many_chats(messages):
            return self.map(messages, **options)
        with self._begin(chat_fields(messages), options, stream=False) as stream:
            return stream.completion()

    @with_options
    def stream_chat(self, messages: Chat, **options: Unpack[GenerateOptions]) -> CompletionStream:
        """Answer chat messages and return an iterator over the pieces as they come."""
        return self._begin(chat_fields(messages), options, stream=True)

    @overload
    def map(
        self,
        prompts: Iterable[AnyPrompt],
        *,
        max_in_flight: int = ...,
        on_progress: Progress | None = ...,
        return_exceptions: Literal[False] = ...,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def map(
        self,
        prompts: Iterable[AnyPrompt],
        *,
        max_in_flight: int = ...,
        on_progress: Progress | None = ...,
        return_exceptions: bool,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion | MgpuError]: ...

    @with_options
    def map(
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
        connection = self._connection()
        connection.answer_all(answers, lambda prompt: self._request(any_field(prompt), options, stream=False))
        return answers.in_order()

    def count_tokens(self, prompt: Prompt, *, template_options: TemplateOptions = None, tools: Tools = None) -> int:
        """Return how many prompt tokens a request with ``prompt``, text or chat messages, would have."""
        message = tokenize_message(prompt, "count", template_options, tools=tools)
        return self._ask_text(message, Tokenized).num_tokens or 0

    def tokenize(
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
        return int32_array(self._ask_text(message, Tokenized).token_ids or b"").tolist()

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``token_ids``."""
        return self._ask_text(detokenize_message(token_ids, skip_special_tokens), Detokenized).text

    def apply_chat_template(
        self, messages: Chat, *, template_options: TemplateOptions = None, tools: Tools = None, documents: Tools = None
    ) -> str:
        """Return the text that the model's chat template makes of ``messages``."""
        return (
            self._ask_text(
                tokenize_message(messages, "text", template_options, tools=tools, documents=documents), Tokenized
            ).text
            or ""
        )

    def health(self) -> Health:
        """Ask for the server's state."""
        return self._query("health", Health)

    def stats(self) -> dict[str, float]:
        """Ask for the engine's and the gateway's counters."""
        return self._query("stats", Stats).counters

    def models(self) -> list[dict[str, object]]:
        """List what is served: name, max_seq_len, vocab_size, chat."""
        return self._query("models", Models).models

    def close(self) -> None:
        """End everything in flight in all threads of this process and close the sockets; a second call does nothing."""
        self._closed = True
        self._connections().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._server.found!r}{', closed' if self._closed else ''})"

    # ------------------------------------------------------------- plumbing

    def _begin(self, what: Mapping[str, object], options: GenerateOptions, *, stream: bool) -> CompletionStream:
        request, timeout_s = self._request(what, options, stream=stream)
        deadline_s = time.monotonic() + timeout_s
        connection = self._connection(timeout_s)
        connection.begin(request, deadline_s - time.monotonic())
        return CompletionStream(connection, request, deadline_s)

    def _request(
        self, what: Mapping[str, object], options: GenerateOptions, *, stream: bool
    ) -> tuple[ResumableRequest, float]:
        """Return a checked request that is not sent yet, and its longest time in seconds."""
        named_s = options.get("timeout_s")
        timeout_s = self._timeouts.request_s if named_s is None else named_s
        message = generate_message(next(self._ids), what, options, stream=stream, timeout_s=timeout_s)
        return ResumableRequest(message, self._retries), timeout_s

    def _query(self, kind: QueryKind, reply_type: type[Reply]) -> Reply:
        return self._connection().query({"type": kind, "id": next(self._ids)}, reply_type)

    def _ask_text(self, message: Mapping[str, object], reply_type: type[Reply]) -> Reply:
        timeout_s, silence_s = self._timeouts.request_s, self._timeouts.silence_s
        deadline_s, retries_left = time.monotonic() + timeout_s, self._retries
        while True:
            try:
                asked = {**message, "id": next(self._ids)}
                return self._connection(deadline_s - time.monotonic()).query(
                    asked, reply_type, silence_s, deadline_s - time.monotonic()
                )
            except RequestFailed as error:
                time.sleep(wait_before_retry_s(error, retries_left, deadline_s))
                retries_left -= 1

    def _connections(self) -> ProcessConnections:
        return self._processes.setdefault(os.getpid(), ProcessConnections())

    def _connection(self, longest_s: float = math.inf) -> Connection:
        """Return the connection of this thread. If it has none, make it and wait for the server, so long at most.

        The same if the server has ended and another is to be used. Streams of the old one keep its connection.
        """
        if self._closed:
            raise MgpuError("the client is closed")
        connections = self._processes.get(os.getpid()) or self._connections()
        connection = connections.of_this_thread()
        if connection is None or self._has_another_server(connection):
            connection = Connection(lambda: Session(self._server.endpoint(), self._keys), self._timeouts)
            try:
                connection.connect(longest_s)
            except BaseException:
                connection.close()
                raise
            connections.add(connection)
        return connection

    def _has_another_server(self, connection: Connection) -> bool:
        return connection.is_lost() and self._server.endpoint() != connection.session.channel.endpoint

    @property
    def _session(self) -> Session:
        """The session of this thread, as it is: nothing is received to return it."""
        return (self._connections().of_this_thread() or self._connection()).session

    def _wait(self, waits: Iterable[float]) -> None:
        self._connection().wait(waits)


def _client_of(
    endpoint: str | None,
    timeout_s: float,
    keys: str | Path | None,
    connect_timeout_s: float,
    silence_timeout_s: float,
    retries: int,
) -> Client:
    return Client(
        endpoint,
        timeout_s,
        keys=keys,
        connect_timeout_s=connect_timeout_s,
        silence_timeout_s=silence_timeout_s,
        retries=retries,
    )
