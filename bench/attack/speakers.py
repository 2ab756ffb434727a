"""How honest clients of the bench speak to the server: through the front channel, and over HTTP."""

import http.client
import json
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

from bench.chaos.load import Job
from mgpu import Client

TIMEOUT_S = 60.0
"""Silence for so long is a loss."""
HELLO = [{"role": "user", "content": "Hello!"}]


class Speaker(Protocol):
    """One honest client; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None: ...

    def answer(self, job: Job, note: Callable[[int], None]) -> object:
        """Stream an answer and return what is compared. ``note`` is told how many tokens have come."""

    def greet(self) -> None:
        """Return when the first token of a short chat has come."""


class FrontSpeaker(Client):
    """The package's own client. Token ids are compared."""

    def answer(self, job: Job, note: Callable[[int], None]) -> object:
        found: list[int] = []
        for piece in self.stream(job.prompt, **job.options()):  # type: ignore[arg-type]
            found += piece.token_ids
            note(len(piece.token_ids))
        return tuple(found)

    def greet(self) -> None:
        for _piece in self.stream_chat(HELLO, max_tokens=1):
            return


class HttpSpeaker:
    """A client of the OpenAI API, with a connection that stays open. Texts are compared; tokens come with their end."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        self._headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._connection.close()

    def answer(self, job: Job, note: Callable[[int], None]) -> object:
        text = ""
        body = {"prompt": list(job.prompt), "stream_options": {"include_usage": True}, "temperature": 0.0}
        for event in self._stream("/v1/completions", body | job.options()):
            text += "".join(choice["text"] for choice in event["choices"])
            if usage := event.get("usage"):
                note(usage["completion_tokens"])
        return text

    def greet(self) -> None:
        events = self._stream("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})
        next(events)
        for _rest in events:  # the connection can be used again when all of the answer has been read
            pass

    def _stream(self, path: str, body: Mapping[str, object]) -> Iterator[dict[str, Any]]:
        try:
            self._connection.request("POST", path, json.dumps({**body, "stream": True}), self._headers)
            response = self._connection.getresponse()
            if response.status != http.client.OK:
                raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(f"the stream broke off: {event}")
                    yield event
        except (OSError, http.client.HTTPException, ValueError):
            self._connection.close()  # the next request opens it again
            raise
