"""Clients of the benchmark: many requests over one connection, as cheap as Python can make them."""

import time
from collections.abc import Iterator
from contextlib import suppress

import zmq

from mgpu.protocol.front import framing
from mgpu.protocol.front.frames import receive_frames, send_message

PROMPT = b"\x05\0\0\0"


class Flood:
    """Requests over one connection, so many in flight at the same time."""

    def __init__(self, endpoint: str, max_tokens: int = 1, takes_batches: bool = False) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        framing.set_client_options(self._socket, endpoint)
        self._socket.connect(endpoint)
        if takes_batches:
            send_message(self._socket, *framing.pack({"type": "batch", "id": 0}))
        self._max_tokens = max_tokens
        self._number = 0
        self.tokens = 0
        """Messages of tokens that have come."""

    def run(self, prompts: list[bytes], window: int) -> float:
        """Send one request for each prompt; return the seconds until the last has ended."""
        began_s, left = time.perf_counter(), iter(prompts)
        flying = sum(self.send(next(left, None)) for _ in range(window))
        while flying:
            if not self._socket.poll(30_000):
                raise SystemExit("no answer for 30 s")
            with suppress(zmq.Again):
                while True:
                    for message in framing.unpack_batch(receive_frames(self._socket)):
                        flying += self._take(message, left)
        return time.perf_counter() - began_s

    def count(self, seconds: float) -> None:
        """Count the tokens that come within so many seconds; requests that end are begun again."""
        end_s, prompts = time.perf_counter() + seconds, iter(lambda: PROMPT, None)
        while (left_s := end_s - time.perf_counter()) > 0:
            if self._socket.poll(int(left_s * 1000)):
                with suppress(zmq.Again):
                    while True:
                        for message in framing.unpack_batch(receive_frames(self._socket)):
                            self._take(message, prompts)

    def _take(self, message: dict[object, object], left: Iterator[bytes]) -> int:
        """Look at a message; return by how many more requests are in flight."""
        kind = message["type"]
        if kind == "failed":
            raise SystemExit(f"a request failed: {message}")
        self.tokens += kind == "tokens"
        return self.send(next(left, None)) - 1 if kind == "finished" else 0

    def send(self, prompt: bytes | None) -> int:
        """Send a request, if there is a prompt; return how many were sent."""
        if prompt is None:
            return 0
        self._number += 1
        request = {"type": "generate", "id": self._number, "prompt_ids": prompt, "stream": True}
        send_message(self._socket, *framing.pack({**request, "max_tokens": self._max_tokens}))
        return 1

    def close(self) -> None:
        self._socket.close()
