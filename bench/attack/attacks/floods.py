"""Attacks by many messages of one type, by not reading, by leaving, and by random mixes of everything."""

import itertools
import time
from collections.abc import Callable

from bench.attack.attacks.clock import Clock
from bench.attack.peers import VERSION, Attacker, drain
from bench.attack.sessions import SESSION, Seen, run_sessions


def questions(attacker: Attacker, clock: Clock) -> None:
    """Ask for the counters without end, from many connections."""
    _flood(attacker, clock, 20, lambda turn: {"type": "stats"})


def health_questions(attacker: Attacker, clock: Clock) -> None:
    """Ask for the state and the models in turns."""
    _flood(attacker, clock, 20, lambda turn: {"type": ("health", "models")[turn % 2]})


def tokenize_flood(attacker: Attacker, clock: Clock) -> None:
    """Have texts tokenized: some short, some a hundred thousand characters long."""
    texts = ("hello " * 10, "hello world " * 8000)
    _flood(attacker, clock, 10, lambda turn: {"type": "tokenize", "prompt": texts[turn % 8 == 0]})


def detokenize_flood(attacker: Attacker, clock: Clock) -> None:
    """Have as many token ids turned into text as a message can hold."""
    ids = b"\5\0\0\0" * 200_000
    _flood(attacker, clock, 10, lambda turn: {"type": "detokenize", "token_ids": ids if turn % 8 == 0 else ids[:400]})


def cancel_flood(attacker: Attacker, clock: Clock) -> None:
    """Cancel requests that do not exist."""
    _flood(attacker, clock, 10, lambda turn: {"type": "cancel", "id": turn + 1})


def unknown_types(attacker: Attacker, clock: Clock) -> None:
    """Send messages of types that do not exist, and of those that only a server sends."""
    types = ("gernate", "tokens", "x" * 10_000, "finished")
    _flood(attacker, clock, 10, lambda turn: {"type": types[turn % 4]})


def same_id(attacker: Attacker, clock: Clock) -> None:
    """Begin the same request again and again while it runs."""
    _flood(attacker, clock, 5, lambda turn: {"type": "generate", "id": 1, "prompt_ids": [5], "max_tokens": 100})


def bad_versions(attacker: Attacker, clock: Clock) -> None:
    """Send frames that are no message of this protocol."""
    peers = attacker.connect_many(10)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        if not attacker.send(peer, [(b"mgpu0", VERSION, b"")[turn % 3]]):
            time.sleep(0.001)
        drain(peer)


def _flood(attacker: Attacker, clock: Clock, connections: int, message: Callable[[int], dict[str, object]]) -> None:
    peers = attacker.connect_many(connections)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        if not attacker.say(peer, **message(turn)):
            time.sleep(0.0005)
        drain(peer)


def submit_and_cancel(attacker: Attacker, clock: Clock) -> None:
    """Begin requests and cancel them at once."""
    peers = attacker.connect_many(5)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        attacker.say(peer, type="generate", id=turn + 1, prompt_ids=[5, 6, 7], max_tokens=100)
        attacker.say(peer, type="cancel", id=turn + 1)
        drain(peer)


def resume_flood(attacker: Attacker, clock: Clock) -> None:
    """Ask for requests that do not exist, and for one that does, again and again."""
    peers = attacker.connect_many(5)
    attacker.say(peers[0], type="generate", id=1, session=SESSION, prompt_ids=[5, 6, 7], max_tokens=300)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        attacker.say(peer, type="resume", id=turn % 50 + 1, session=SESSION, offsets=[0])
        drain(peer)


def leave_in_the_middle(attacker: Attacker, clock: Clock) -> None:
    """Begin a request and go away, for the line that this leaves in the log."""
    for _ in clock.turns():
        peer = attacker.connect()
        attacker.say(peer, type="generate", prompt_ids=[5, 6, 7], max_tokens=200, stream=True)
        peer.poll(20)
        peer.close(linger=0)


def do_not_read(attacker: Attacker, clock: Clock) -> None:
    """Ask for much and read nothing of it."""
    peers = attacker.connect_many(10)
    for turn in clock.turns(0.001):
        attacker.say(peers[turn % len(peers)], type="stats")
        if turn % 50 == 0:
            attacker.say(
                peers[turn % len(peers)],
                type="generate", prompt_ids=[5], max_tokens=400, stream=True, logprobs=20, ignore_eos=True,
            )  # fmt: skip


def unread_texts(attacker: Attacker, clock: Clock) -> None:
    """Have texts made that are as long as an answer can be, and read none of them."""
    peers = [attacker.connect(reads_ahead=False) for _ in range(10 * attacker.strength)]
    ids = b"\5\0\0\0" * 200_000
    for turn in clock.turns(0.001):
        attacker.say(peers[turn % len(peers)], type="detokenize", token_ids=ids)


def random_sessions(attacker: Attacker, clock: Clock) -> None:
    """Run random hostile sessions, those of `bench/attack/hostile.py`, many at a time."""
    run_sessions(itertools.count(), 7, [attacker], 16 * attacker.strength, clock.end_s, Seen(), finishes=False)


FLOODS: tuple[Callable[[Attacker, Clock], None], ...] = (
    questions, health_questions, tokenize_flood, detokenize_flood, cancel_flood, unknown_types, same_id, bad_versions,
    submit_and_cancel, resume_flood, leave_in_the_middle, do_not_read, unread_texts, random_sessions,
)  # fmt: skip
