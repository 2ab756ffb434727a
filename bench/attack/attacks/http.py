"""Attacks on the HTTP server by a client that has an API key, and by connections that never show one."""

import itertools
import json
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

from bench.attack.attacks.clock import Clock
from bench.attack.peers import Attacker

BODY_BYTES = 4 << 20
"""As much as a body may have."""
STREAMED = {"prompt": [5, 6, 7], "stream": True, "ignore_eos": True}


def _head(attacker: Attacker, path: str, length: int, method: str = "POST") -> bytes:
    lines = (
        f"{method} {path} HTTP/1.1", "host: localhost", f"authorization: Bearer {attacker.secret}",
        "content-type: application/json", f"content-length: {length}",
    )  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def _post(attacker: Attacker, path: str, body: bytes | Mapping[str, object]) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _head(attacker, path, len(data)) + data


def http_slow_bodies(attacker: Attacker, clock: Clock) -> None:
    """Begin heads and bodies on hundreds of connections, and send a byte now and then."""
    begun = _head(attacker, "/v1/completions", BODY_BYTES) + b'{"prompt": "'
    with ExitStack() as held:
        while clock.left_s:
            peers = []
            for number in range(100 * attacker.strength):
                with suppress(OSError):
                    peers.append(held.enter_context(attacker.raw()))
                    attacker.write(peers[-1], begun if number % 2 else begun[:30])
            end_s = time.monotonic() + min(15.0, clock.left_s)
            while time.monotonic() < end_s:
                for peer in peers:
                    with suppress(OSError):
                        attacker.write(peer, b"x")
                time.sleep(0.1)
            held.close()


def http_huge_bodies(attacker: Attacker, clock: Clock) -> None:
    """Send bodies that are as costly to read as four megabytes can be, and longer ones, in pieces without end."""
    number = json.dumps({"prompt": list(range(600_000))}).encode()
    bodies = (
        b'{"messages": [' + b"[]," * (BODY_BYTES // 3 - 10) + b"[]]}",
        json.dumps({str(each): each for each in range(200_000)}).encode(),
        number[:BODY_BYTES],
        json.dumps({"prompt": "\u0001" * (BODY_BYTES // 6 - 10)}).encode(),
    )
    requests = [_post(attacker, "/v1/chat/completions", body) for body in bodies]
    endless = _head(attacker, "/v1/completions", 0).replace(b"content-length: 0", b"transfer-encoding: chunked")
    requests.append(endless + b"10000\r\n" + bytes(65_536) + b"\r\n" + (b"10000\r\n" + bytes(65_536) + b"\r\n") * 80)
    _in_turns(attacker, clock, 2, requests)


def http_malformed(attacker: Attacker, clock: Clock) -> None:
    """Send bodies that are no JSON, or no request, by the thousand and several at once."""
    bodies = (
        b'{"prompt": ', b"[" * 3000, b'{"prompt": "x", "prompt": "y"}', b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"prompt": "x", "temperature": -1}', b'{"messages": [{"role": "wizard", "content": "x"}]}', b"{}", b"null",
    )  # fmt: skip
    requests = [_post(attacker, "/v1/chat/completions", body) for body in bodies]
    _in_turns(attacker, clock, 5, [b"".join(requests), *requests])


def http_questions(attacker: Attacker, clock: Clock) -> None:
    """Ask for everything that needs no model, without end, from many connections."""
    paths = ("/health", "/v1/models", "/metrics", "/status", "/openapi.json", "/nowhere", "/version")
    requests = [_head(attacker, path, 0, "GET") for path in paths]
    _in_turns(attacker, clock, 10, [b"".join(requests), *requests])


def http_long_chats(attacker: Attacker, clock: Clock) -> None:
    """Send conversations of 300 turns, which no context holds."""
    turns = [{"role": "user", "content": "hello " * 40}] * 300
    _in_turns(attacker, clock, 5, [_post(attacker, "/v1/chat/completions", {"messages": turns, "max_tokens": 1})])


def _in_turns(attacker: Attacker, clock: Clock, count: int, requests: list[bytes]) -> None:
    """Send requests on ``count`` connections for each unit of strength, each of them as soon as it takes one.

    Answers are read and thrown away. A connection that the server has ended is opened again.
    """
    peers: list[_Peer] = [_Peer(attacker, requests, number) for number in range(count * attacker.strength)]
    for _ in clock.turns():
        if not sum([peer.go_on() for peer in peers]):
            time.sleep(0.001)
    for peer in peers:
        peer.close()


class _Peer:
    """A connection that sends one request after the other and waits for no answer."""

    def __init__(self, attacker: Attacker, requests: list[bytes], first: int) -> None:
        self._attacker = attacker
        self._requests = itertools.cycle(requests[first % len(requests) :] + requests[: first % len(requests)])
        self._socket: socket.socket | None = None
        self._rest = memoryview(b"")

    def go_on(self) -> bool:
        """Send what the connection takes now; False if that is nothing."""
        try:
            peer = self._socket = self._socket or self._connect()
            with suppress(BlockingIOError):
                if not peer.recv(1 << 16):
                    raise ConnectionError
            if not self._rest:
                self._rest = memoryview(next(self._requests))
                self._attacker.cost.messages += 1
            sent = peer.send(self._rest)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        self._attacker.cost.nbytes += sent
        self._rest = self._rest[sent:]
        return True

    def _connect(self) -> socket.socket:
        found = self._attacker.open()
        found.setblocking(False)
        self._rest = memoryview(b"")
        return found

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def http_connections(attacker: Attacker, clock: Clock) -> None:
    """Open connections and reset them: silent, in the middle of a head, or with one question."""
    question = _head(attacker, "/health", 0, "GET")
    begun = (b"", question[:20], question, b"\x16\x03\x01\x02\x00")
    for turn in clock.turns():
        for _ in range(attacker.strength):
            with suppress(OSError), attacker.raw() as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", turn % 2, 0))
                attacker.write(peer, begun[turn % len(begun)])
        time.sleep(0.0005)


def http_abandoned_streams(attacker: Attacker, clock: Clock) -> None:
    """Begin streams and go away, mostly at once, some after their first bytes."""
    request = _post(attacker, "/v1/completions", {**STREAMED, "max_tokens": 400})
    for turn in clock.turns():
        with ExitStack() as held, suppress(OSError):
            for _ in range(attacker.strength):
                peer = held.enter_context(attacker.raw())
                attacker.write(peer, request)
            peer.settimeout(0.0 if turn % 10 else 0.05)
            peer.recv(100)


def http_unread_streams(attacker: Attacker, clock: Clock) -> None:
    """Begin streams with much to say for each token, and read none of it."""
    request = _post(attacker, "/v1/completions", {**STREAMED, "max_tokens": 400, "logprobs": 5})
    with ExitStack() as held:
        for _ in clock.turns(0.05):
            with suppress(OSError):
                peer = held.enter_context(attacker.open(receive_bytes=4096))
                attacker.write(peer, request)


HTTP: tuple[Callable[[Attacker, Clock], None], ...] = (
    http_slow_bodies, http_huge_bodies, http_malformed, http_questions, http_long_chats, http_connections,
    http_abandoned_streams, http_unread_streams,
)  # fmt: skip
