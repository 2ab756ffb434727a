"""The same requests by HTTP and by the front channel: first tokens and the end of each, with little work here."""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mgpu.protocol.client.async_client import AsyncClient

_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Timed:
    """One streamed answer. Times are seconds since it was sent."""

    first_s: float
    end_s: float
    num_tokens: int


class _Answer(asyncio.Protocol):
    """Notes when the first event and the last one come; the text between them is not read."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self.transport: Any = None
        self.done: asyncio.Future[Timed] = asyncio.get_running_loop().create_future()
        self._sent_s = self._first_s = 0.0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, request: bytes) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._first_s, self._tail = 0.0, b""
        self._sent_s = self._clock()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self._first_s and b"data: " in data:
            self._first_s = self._clock()
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if b"data: [DONE]" in self._tail and not self.done.done():
            found = _TOKENS.findall(self._tail)
            took = (self._first_s - self._sent_s, self._clock() - self._sent_s)
            self.done.set_result(Timed(*took, int(found[-1]) if found else 0))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the stream ended early: {self._tail[-300:]!r}"))


class HttpLoad:
    """Streams over HTTP, each on a connection of its own that stays open."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._answers: list[_Answer] = []

    async def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Timed]:
        """Send all prompts at the same time; return when all are answered."""
        await self.open(len(prompts))
        for answer, prompt in zip(self._answers, prompts, strict=False):
            answer.send(self._request(prompt, new_tokens))
        return list(await asyncio.gather(*(answer.done for answer in self._answers[: len(prompts)])))

    async def open(self, count: int) -> None:
        """Make connections until there are ``count``."""
        loop = asyncio.get_running_loop()
        while len(self._answers) < count:
            _, answer = await loop.create_connection(_Answer, self._host, self._port)
            self._answers.append(answer)

    def close(self) -> None:
        for answer in self._answers:
            answer.done.cancel()
            answer.transport.close()

    def _request(self, prompt: Sequence[int], new_tokens: int) -> bytes:
        body = {
            "prompt": list(prompt), "max_tokens": new_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        return head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data


class FrontLoad:
    """Streams over the front channel, all by one AsyncClient."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Timed]:
        """Send all prompts at the same time; return when all are answered."""
        return list(await asyncio.gather(*(self._answer(prompt, new_tokens) for prompt in prompts)))

    async def _answer(self, prompt: Sequence[int], new_tokens: int) -> Timed:
        clock = asyncio.get_running_loop().time
        began_s, first_s, count = clock(), 0.0, 0
        stream = self._client.stream(prompt, max_tokens=new_tokens, ignore_eos=True, temperature=0)
        async for piece in stream:
            first_s = first_s or clock()
            count += len(piece.token_ids)
        return Timed(first_s - began_s, clock() - began_s, count)
