"""Seeded random hostile sessions: what one ill-behaved client does from its first connection to its last.

A session has a character (`CHARACTERS`), which says what it mostly does, and takes one action a turn, so that many
sessions are interleaved. The same seed and number give the same session. Where a session waits for its answers, each
of its requests must end exactly once: everything else that it sees is its own fault.
"""

import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgpack
import zmq

from bench.attack.peers import VERSION, Attacker, command, greeting, null_handshake

ANSWER_S = 60.0
"""How long a session that waits gives the server to end its requests, beside everything else that goes on."""
SESSION = "0123456789abcdef"
TURN = {"role": "user", "content": "hello there "}
MOST_PENDING = 8

CHARACTERS: dict[str, tuple[str, ...]] = {
    "valid": ("generate", "generate", "ask", "read", "wait"),
    "broken": ("bad_field", "bad_frames", "bad_body", "read"),
    "mixed": ("generate", "bad_field", "bad_frames", "bad_body", "cancel", "ask", "resume", "text", "read"),
    "flood": ("flood",),
    "abandoned": ("generate", "generate", "leave"),
    "resumed": ("generate", "read", "leave", "resume", "resume", "wait"),
    "cancelled": ("generate", "cancel", "generate", "cancel", "read"),
    "same ids": ("generate_again", "generate_again", "resume", "cancel", "read"),
    "unread": ("generate", "ask", "text"),
    "bytes": ("raw",),
}
COMMON = (*CHARACTERS, *(name for name, words in CHARACTERS.items() if "wait" not in words for _ in range(3)))
"""How often each character is drawn: those that wait for the model take much longer than the others."""
PATIENT = {name for name, words in CHARACTERS.items() if "wait" in words}


def is_patient(number: int, seed: int) -> bool:
    """Return whether a session waits for its answers."""
    return random.Random(f"{seed}/{number}").choice(COMMON) in PATIENT


@dataclass
class Seen:
    """What all sessions have done and seen."""

    sessions: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class HostileSession:
    """One session. `step` takes its next action."""

    def __init__(self, number: int, seed: int, attackers: Sequence[Attacker], seen: Seen) -> None:
        self._number = number
        self._rng = random.Random(f"{seed}/{number}")
        self._seen = seen
        self.character = self._rng.choice(COMMON)
        self._attacker = self._rng.choice(attackers)
        seen.sessions[self.character] += 1
        self._actions = self._plan()
        self._last_id = self._rng.choice([0, 0, 0, 1 << 40])
        self._pending: set[int] = set()
        """Requests that the server must end, as long as this connection lasts."""
        self._accepted: set[int] = set()
        self._wait_until_s: float | None = None
        self._question: int | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._peer = self._connect()

    def _plan(self) -> Iterator[str]:
        words = CHARACTERS[self.character]
        count = self._rng.randrange(1, 9)
        return iter([words[at % len(words)] if at < 3 else self._rng.choice(words) for at in range(count)])

    def _connect(self) -> "zmq.Socket[bytes] | None":
        if self.character == "bytes":
            return None
        chosen = self._rng.choice([None, None, None, self._rng.randbytes(self._rng.randrange(1, 20))])
        if chosen is not None and chosen[:1] == b"\0":
            chosen = b"\1" + chosen  # libzmq aborts the sender's own process at some of these
        peer = self._attacker.connect(chosen)
        if self.character in PATIENT:
            self._monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        return peer

    def step(self) -> bool:
        """Take the next action, or go on waiting. False when the session is over."""
        if self._wait_until_s is not None:
            self._go_on_waiting()
            return True
        action = next(self._actions, None)
        if action is None:
            self.close()
            return False
        self._seen.actions[action] += 1
        getattr(self, f"_{action}")()
        return True

    @property
    def is_waiting(self) -> bool:
        return self._wait_until_s is not None

    def close(self) -> None:
        if self._peer is not None:
            if self._monitor is not None:
                self._peer.disable_monitor()
                self._monitor.close(linger=0)
                self._monitor = None
            self._peer.close(linger=0)
            self._peer = None

    def _say(self, **fields: object) -> bool:
        if self._peer is None:
            return False
        return self._attacker.send(self._peer, [VERSION, msgpack.packb(fields)])

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    # Actions

    def _generate(self) -> None:
        if len(self._pending) >= MOST_PENDING:
            return
        rng, request_id = self._rng, self._new_id()
        prompt: dict[str, object] = rng.choice(
            [
                {"prompt_ids": [rng.randrange(3, 40_000) for _ in range(rng.choice([1, 3, 30]))]},
                {"prompt": "x " * rng.randrange(1, 60)},
                {"messages": [TURN] * rng.randrange(1, 5)},
            ]
        )
        session = (
            {"session": SESSION + str(self._number)} if self.character == "resumed" or not rng.randrange(3) else {}
        )
        options = {"max_tokens": rng.randrange(1, 6), "stream": rng.random() < 0.5, "n": rng.choice([1, 1, 1, 2])}
        if self._say(type="generate", id=request_id, **prompt, **session, **options):
            self._pending.add(request_id)

    def _generate_again(self) -> None:
        self._say(type="generate", id=1, prompt_ids=[5, 6, 7], max_tokens=self._rng.randrange(1, 20), stream=True)

    def _cancel(self) -> None:
        self._say(type="cancel", id=self._last_id or self._rng.randrange(1 << 62))

    def _ask(self) -> None:
        self._say(type=self._rng.choice(["health", "stats", "models"]), id=self._new_id())

    def _text(self) -> None:
        if self._rng.random() < 0.5:
            self._say(type="tokenize", id=self._new_id(), prompt="ab é " * self._rng.randrange(1, 400))
        else:
            self._say(type="detokenize", id=self._new_id(), token_ids=[5] * self._rng.randrange(1, 400))

    def _resume(self) -> None:
        offsets = [self._rng.randrange(-1, 4) for _ in range(self._rng.choice([1, 1, 2]))]
        self._say(type="resume", id=self._last_id, session=SESSION + str(self._number), offsets=offsets)

    def _bad_field(self) -> None:
        wrong = self._rng.choice(
            [
                {"temperature": -1}, {"top_p": float("nan")}, {"n": 0}, {"stop": [""]}, {"stop": ["y" * 300]},
                {"logit_bias": [[1, 1.0]] * 2000}, {"prompt_ids": []}, {"prompt_ids": [-1]}, {"model": "x" * 5000},
                {"max_tokens": -5}, {"nonsense": {"a": [[[]]]}}, {"session": "short"}, {"prompt": ""},
                {"messages": [{"role": "wizard", "content": "x"}]}, {"priority": 10**9}, {"prompt_ids": [5] * 3000},
            ]
        )  # fmt: skip
        self._say(**{"type": "generate", "id": self._new_id(), "prompt_ids": [5], "max_tokens": 2, **wrong})

    def _bad_frames(self) -> None:
        if self._peer is None:
            return
        count = self._rng.choice([1, 1, 2, 3, 5, 200])
        frames = [self._rng.choice([VERSION, b"", b"mgpu0", self._rng.randbytes(9)]) for _ in range(count)]
        self._attacker.send(self._peer, frames)

    def _bad_body(self) -> None:
        body = self._rng.choice(
            [b"", b"\xc1", b"\x91" * 2000, b"\xdd\xff\xff\xff\xff", b"\x81\xa1x\xdc\xff\xff" + b"\x90" * 9000,
             msgpack.packb({"type": "generate"})[:-1], self._rng.randbytes(99), b"\x90" * 60_000]
        )  # fmt: skip
        if self._peer is not None:
            self._attacker.send(self._peer, [VERSION, body])

    def _flood(self) -> None:
        kind = self._rng.choice([self._ask, self._cancel, self._resume, self._bad_field, self._bad_body, self._text])
        for _ in range(self._rng.randrange(5, 60)):
            kind()

    def _leave(self) -> None:
        """Close the connection with everything in flight, and come back on another."""
        self.close()
        self._pending.clear()
        self._peer = self._connect()

    def _read(self) -> None:
        for message in self._received():
            self._note(message)

    def _wait(self) -> None:
        """Begin to wait until the server has ended every request. It may refuse them, but not forget them."""
        self._wait_until_s, self._question = time.monotonic() + ANSWER_S, None

    def _go_on_waiting(self) -> None:
        self._read()
        if self._monitor is not None and self._monitor.poll(0):
            self._pending.clear()  # the server has ended the connection, and what was in flight there with it
        if self._pending and time.monotonic() > (self._wait_until_s or 0.0):
            if self._question is None:  # forgotten, or is nobody there?
                self._question = self._new_id()
                self._pending.add(self._question)
                self._say(type="health", id=self._question)
                self._wait_until_s = time.monotonic() + ANSWER_S
                return
            forgotten = self._pending & self._accepted
            what = "silence" if self._question in self._pending else f"{len(self._pending)} requests were never ended"
            what += f", {len(forgotten)} of them were accepted"
            self._seen.problems.append(f"session {self._number} ({self.character}): {what}")
            self._pending.clear()
        if not self._pending:
            self._wait_until_s = None

    def _raw(self) -> None:
        """Send bytes that no library would send, and leave."""
        rng = self._rng
        data = rng.choice(
            [
                rng.randbytes(rng.randrange(1, 300)),
                greeting(b"NULL"),
                greeting(b"CURVE") + command(b"\5HELLO" + rng.randbytes(194)),
                null_handshake()[: rng.randrange(1, 100)],
                null_handshake() + b"\1\0" * rng.randrange(1, 3000),
                null_handshake() + b"\2" + struct.pack(">Q", 1 << rng.randrange(1, 63)),
                null_handshake(b"ROUTER"),
                b"GET / HTTP/1.1\r\n\r\n",
            ]
        )
        with suppress(OSError), self._attacker.raw() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", rng.random() < 0.3, 0))
            self._attacker.write(peer, data)

    def _received(self) -> Iterator[dict[str, object]]:
        while self._peer is not None:
            try:
                frames = self._peer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield msgpack.unpackb(frames[-1])

    def _note(self, message: dict[str, object]) -> None:
        kind, request_id = str(message.get("type")), message.get("id")
        self._seen.answers[f"failed: {message.get('code')}" if kind == "failed" else kind] += 1
        if kind == "accepted" and isinstance(request_id, int):
            self._accepted.add(request_id)
        if kind in ("finished", "failed", "health"):
            if isinstance(request_id, int):
                self._pending.discard(request_id)
            else:  # about the connection as a whole
                self._pending.clear()


def run_sessions(
    numbers: Iterator[int],
    seed: int,
    attackers: list[Attacker],
    width: int,
    until_s: float,
    seen: Seen,
    *,
    finishes: bool = True,
) -> int:
    """Run sessions, ``width`` of them at a time, until there are no more numbers or the time is over.

    What has begun then goes on to its end, unless ``finishes`` is false. Return how many were run to their end. Each
    of ``attackers`` has a key of its own.
    """
    running: list[HostileSession] = []
    done = 0
    while finishes or time.monotonic() < until_s:
        while len(running) < width and time.monotonic() < until_s and (number := next(numbers, None)) is not None:
            running.append(HostileSession(number, seed, attackers, seen))
        if not running:
            return done
        if all(session.is_waiting for session in running):
            time.sleep(0.002)
        going = [session for session in running if session.step()]
        done += len(running) - len(going)
        running = going
    for session in running:
        session.close()
    return done
