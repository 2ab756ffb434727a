"""A server that answers at once, so that what is measured is the router: ``python -m bench.router.stand_in ENDPOINT``.

It speaks just enough of docs/protocol.md, and counts how many prompts began with 1,024 bytes that it had seen before.
"""

import signal
import sys
from typing import Any

import msgpack
import zmq

from mgpu.protocol.front import framing
from mgpu.protocol.internal.child import end_with_parent

PREFIX_BYTES = 1024


class StandIn:
    """Answers each message by itself."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._hits = self._requests = 0

    def answers(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what is said to a message of a client."""
        number, kind = message["id"], message["type"]
        if kind == "generate":
            return self._generate(number, message)
        if kind == "health":
            return [{
                "type": "health", "id": number, "state": "ready", "model": "stand-in", "max_seq_len": 1 << 16,
                "kv_tokens": 1 << 20, "in_flight": 0, "uptime_s": 1.0, "layout": "none",
            }]  # fmt: skip
        if kind == "models":
            return [{"type": "models", "id": number, "models": [{"name": "stand-in", "max_seq_len": 1 << 16}]}]
        if kind == "stats":
            counters = {"hits": float(self._hits), "requests": float(self._requests)}
            return [{"type": "stats", "id": number, "counters": counters}]
        return []

    def _generate(self, number: int, message: dict[str, Any]) -> list[dict[str, Any]]:
        begin = message["prompt_ids"][:PREFIX_BYTES]
        self._requests += 1
        self._hits += begin in self._seen
        self._seen.add(begin)
        prompt = len(message["prompt_ids"]) // 4
        return [
            {"type": "accepted", "id": number, "model": "m", "prompt_tokens": prompt, "max_tokens": 1, "seed": 1},
            {"type": "tokens", "id": number, "index": 0, "text": "a", "token_ids": [97], "finish_reason": "length"},
            {"type": "finished", "id": number, "finish_reasons": ["length"], "prompt_tokens": prompt,
             "completion_tokens": 1, "cached_tokens": 0},
        ]  # fmt: skip


def main() -> None:
    end_with_parent(signal.SIGKILL)
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.bind(sys.argv[1])
    stand_in = StandIn()
    while True:
        peer, _, body = socket.recv_multipart()
        for answer in stand_in.answers(msgpack.unpackb(body)):
            socket.send_multipart([peer, framing.VERSION, msgpack.packb(answer)])


if __name__ == "__main__":
    main()
