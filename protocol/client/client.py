"""The client: `with Client() as client: print(client.generate("The capital of France is").text)`.

Everything streams on one socket, so that any number of answers can be read in turns:

    streams = [client.stream(prompt, max_tokens=64) for prompt in prompts]

A client belongs to the thread that made it; use one client per thread, or AsyncClient.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar, Unpack

import zmq

from mgpu.protocol.client.answer import Answer, answer_to
from mgpu.protocol.client.connection import open_connection
from mgpu.protocol.client.requests import GenerateOptions, chat_map, generate_map
from mgpu.protocol.client.results import Completion, Piece
from mgpu.protocol.errors import DeadlineExceeded, MgpuError
from mgpu.protocol.front.client_messages import QueryKind
from mgpu.protocol.front.server_messages import Health, Models, Stats

CONNECT_TIMEOUT_S = 5.0
QUERY_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 15.0
"""The server says something about every request each second; after this much silence it is taken for dead."""
DEFAULT_TIMEOUT_S = 600.0
LOOK_S = 0.25
"""While the connection is lost: how often to look whether the server's folder is still there, or to resume again."""

R = TypeVar("R", Health, Stats, Models)


class CompletionStream(Iterator[Piece]):
    """Iterate over the pieces of one answer. Closing it, or dropping it unfinished, cancels the request."""

    def __init__(self, client: "Client", answer: Answer, deadline_s: float) -> None:
        self._client = client
        self._answer = answer
        self._deadline_s = deadline_s

    def __next__(self) -> Piece:
        """Wait for the next piece. RequestFailed, DeadlineExceeded or ServerUnreachable when there will be none."""
        answer = self._answer
        if not answer.pieces and not answer.done:
            self._client._wait_for(answer, self._deadline_s)
        if answer.pieces:
            return answer.pieces.popleft()
        if answer.error is not None:
            raise answer.error
        raise StopIteration

    def completion(self) -> Completion:
        """Wait for the end and give the whole answer, whether or not pieces were taken."""
        while not self._answer.done:
            self._client._wait_for(self._answer, self._deadline_s)
            self._answer.pieces.clear()
        return self._answer.completion()

    def close(self) -> None:
        """Cancel what is still to come; a second call does nothing."""
        self._client._cancel(self._answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """A connection to one server. A context manager; `close` ends everything in flight.

    A connection that is lost is made again, and answers go on where they were, within their deadline and as long as
    the server comes back within ``silence_timeout_s``.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        keys: str | Path | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
    ) -> None:
        """Connect to ``endpoint``, else to MGPU_ENDPOINT, else to the server that runs on this machine.

        ``timeout_s`` is the longest a request may take unless the call says otherwise. ``keys`` is this client's key
        file, else MGPU_KEYS, for servers on tcp that want one. ServerUnreachable when nobody answers within
        ``connect_timeout_s``, or the server and this client do not accept each other's keys.
        """
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._thread = threading.get_ident()
        self._closed = False
        self._connection = open_connection(endpoint, keys)
        self._poller = zmq.Poller()
        self._poller.register(self._connection.socket, zmq.POLLIN)
        self._poller.register(self._connection.monitor, zmq.POLLIN)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------- requests

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """Continue ``prompt``, text or token ids, and give the whole answer. Options: messages.Generate."""
        with self._begin(generate_map(self._next_id(), prompt, False, **self._bounded(options))) as stream:
            return stream.completion()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> CompletionStream:
        """Continue ``prompt`` and give its pieces as they come."""
        return self._begin(generate_map(self._next_id(), prompt, True, **self._bounded(options)))

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[GenerateOptions]) -> Completion:
        """Answer chat messages (maps with role and content) through the model's template."""
        with self._begin(chat_map(self._next_id(), messages, False, **self._bounded(options))) as stream:
            return stream.completion()

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], **options: Unpack[GenerateOptions]
    ) -> CompletionStream:
        """Answer chat messages and give the pieces as they come."""
        return self._begin(chat_map(self._next_id(), messages, True, **self._bounded(options)))

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
        """End everything in flight and close the socket; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------- plumbing

    def _next_id(self) -> int:
        self._check_usable()
        return self._connection.next_id()

    def _bounded(self, options: GenerateOptions) -> GenerateOptions:
        options.setdefault("timeout_s", self._timeout_s)
        return options

    def _begin(self, values: dict[str, object]) -> CompletionStream:
        timeout_s = values["timeout_s"]
        assert isinstance(timeout_s, (int, float))
        self._connect()
        answer = answer_to(values)
        self._connection.begin(answer, values)
        return CompletionStream(self, answer, time.monotonic() + timeout_s)

    def _wait_for(self, answer: Answer, deadline_s: float) -> None:
        """Read until ``answer`` has a piece or has ended. DeadlineExceeded, after cancelling it, when time is over."""
        self._check_usable()
        started_s = time.monotonic()
        while not answer.pieces and not answer.done:
            now = time.monotonic()
            silence_s = max(started_s, answer.heard_s) + self._silence_timeout_s
            if now >= min(deadline_s, silence_s):
                self._cancel(answer)
                raise self._too_late(now >= deadline_s)
            left_s = min(deadline_s, silence_s) - now
            self._poll(min(left_s, LOOK_S) if answer.is_adrift or not self._connection.connected else left_s)
            self._connection.receive()

    def _too_late(self, over_deadline: bool) -> MgpuError:
        if over_deadline:
            return DeadlineExceeded("the answer was not complete within timeout_s; the request has been cancelled")
        return self._connection.silent(self._silence_timeout_s)

    def _query(self, kind: QueryKind, reply_type: type[R]) -> R:
        request_id = self._next_id()
        self._connect()
        self._connection.send({"type": kind, "id": request_id})
        deadline_s = time.monotonic() + QUERY_TIMEOUT_S
        while True:
            reply = self._connection.take_reply(request_id)
            if isinstance(reply, reply_type):
                return reply
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not self._connection.connected:
                raise self._connection.unreachable("does not answer")
            self._poll(left_s)
            self._connection.receive()

    def _connect(self) -> None:
        """Wait until the handshake is through, also again after a disconnection. ServerUnreachable when it is not."""
        timeout_s = self._silence_timeout_s if self._connection.was_connected else self._connect_timeout_s
        deadline_s = time.monotonic() + timeout_s
        self._connection.receive()
        while not self._connection.connected:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._connection.refused is not None:
                raise self._connection.refused or self._connection.unreachable(f"did not answer within {timeout_s:g} s")
            if self._connection.server_is_gone():
                raise self._connection.ended()
            self._poll(min(left_s, LOOK_S))
            self._connection.receive()

    def _poll(self, seconds: float) -> None:
        self._poller.poll(max(0, int(seconds * 1000) + 1))

    def _cancel(self, answer: Answer) -> None:
        if self._closed or answer.done or threading.get_ident() != self._thread:
            return
        answer.done = True
        if self._connection.answers.pop(answer.id, None) is not None:
            self._connection.cancel(answer.id)

    def _check_usable(self) -> None:
        if self._closed:
            raise MgpuError("the client is closed")
        if threading.get_ident() != self._thread:
            raise MgpuError("a Client belongs to the thread that made it; use one per thread, or AsyncClient")
