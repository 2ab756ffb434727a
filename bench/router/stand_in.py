"""A server without a model: ``python -m bench.router.stand_in ENDPOINT [--step-ms MS] [--cached PROMPTS]``.

It answers at once, so that what is measured is the router; or with a token for each stream in every step, as workers
do. It speaks just enough of docs/protocol.md. It counts how many prompts began with 1,024 bytes that it had in its
cache, which holds as many such beginnings as `--cached` says, those that were used last.
"""

import argparse
import signal
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgpack
import zmq

from mgpu.orchestrator.gateway.front.batches import Batches
from mgpu.protocol.front import framing
from mgpu.protocol.front.frames import receive_frames, send_message_to
from mgpu.protocol.internal.process.child import end_with_parent

PREFIX_BYTES = 1024
PREFIX_TOKENS = PREFIX_BYTES // 4 + 1

Message = dict[str, Any]


@dataclass(slots=True)
class _Stream:
    peer: bytes
    id: int
    prompt_tokens: int
    left: int


class StandIn:
    """Answers each message by itself."""

    def __init__(self, step_s: float, cached: int, send: Callable[[bytes, Message], None]) -> None:
        self._step_s = step_s
        self._cached = cached
        self._send = send
        self._cache: OrderedDict[bytes, None] = OrderedDict()
        self._hits = self._requests = 0
        self._streams: list[_Stream] = []
        self.takes_batches: set[bytes] = set()

    def take(self, peer: bytes, message: Message) -> None:
        """Answer a message of a client."""
        number, kind = message["id"], message["type"]
        if kind == "batch":
            self.takes_batches.add(peer)
        elif kind == "generate":
            self._begin(peer, number, message)
        elif kind == "health":
            kv_tokens = self._cached * PREFIX_TOKENS
            self._send(peer, {
                "type": "health", "id": number, "state": "ready", "model": "stand-in", "max_seq_len": 1 << 16,
                "kv_tokens": kv_tokens, "in_flight": 0, "uptime_s": 1.0, "layout": "none",
            })  # fmt: skip
        elif kind == "models":
            models = [{"name": "stand-in", "max_seq_len": 1 << 16}]
            self._send(peer, {"type": "models", "id": number, "models": models})
        elif kind == "stats":
            counters = {"hits": float(self._hits), "requests": float(self._requests)}
            self._send(peer, {"type": "stats", "id": number, "counters": counters})

    def _begin(self, peer: bytes, number: int, message: Message) -> None:
        self._look_up(message["prompt_ids"][:PREFIX_BYTES])
        stream = _Stream(peer, number, len(message["prompt_ids"]) // 4, message["max_tokens"])
        accepted = {"prompt_tokens": stream.prompt_tokens, "max_tokens": stream.left, "seed": 1}
        self._send(peer, {"type": "accepted", "id": number, "model": "m", **accepted})
        if self._step_s:
            self._streams.append(stream)
        while not self._step_s and stream.left:
            self._step(stream)

    def _look_up(self, begin: bytes) -> None:
        self._requests += 1
        self._hits += begin in self._cache
        self._cache[begin] = None
        self._cache.move_to_end(begin)
        if len(self._cache) > self._cached:
            self._cache.popitem(last=False)

    def step(self) -> None:
        """Send the next token of each stream."""
        for stream in self._streams:
            self._step(stream)
        self._streams = [stream for stream in self._streams if stream.left]

    def _step(self, stream: _Stream) -> None:
        stream.left -= 1
        tokens: Message = {"type": "tokens", "id": stream.id, "index": 0, "text": "a", "token_ids": [97]}
        if stream.left:
            self._send(stream.peer, tokens)
            return
        self._send(stream.peer, {**tokens, "finish_reason": "length"})
        usage = {"prompt_tokens": stream.prompt_tokens, "completion_tokens": 1, "cached_tokens": 0}
        self._send(stream.peer, {"type": "finished", "id": stream.id, "finish_reasons": ["length"], **usage})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint")
    parser.add_argument("--step-ms", type=float, default=0.0, help="0: whole answers at once")
    parser.add_argument("--cached", type=int, default=4096)
    options = parser.parse_args()
    end_with_parent(signal.SIGKILL)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.bind(options.endpoint)
    step_s = options.step_ms / 1000

    def send(peer: bytes, body: bytes) -> None:
        send_message_to(socket, peer, framing.VERSION, body)

    def send_map(peer: bytes, message: Message) -> None:
        if peer in stand_in.takes_batches:
            batches.add(peer, msgpack.packb(message))
        else:
            send(peer, msgpack.packb(message))

    batches, stand_in = Batches(send), StandIn(step_s, options.cached, send_map)
    next_s = time.monotonic() + step_s
    while True:
        socket.poll(max(0, int((next_s - time.monotonic()) * 1000)) if step_s else None)
        with suppress(zmq.Again):
            while True:
                peer, _, body = receive_frames(socket)
                stand_in.take(peer, msgpack.unpackb(body))
        if step_s and time.monotonic() >= next_s:
            stand_in.step()
            next_s = max(next_s + step_s, time.monotonic())
        batches.send()


if __name__ == "__main__":
    main()
