"""What is tried against the front channel. Each attack goes on until `Clock` says that its time is over.

``strength`` multiplies connections, or what one message holds. None of these needs more than what a client that is let
in has (on tcp, a key), and `half_hello` needs not even that.
"""

import random
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import zmq

from bench.attack.peers import FRAME_BYTES, VERSION, Attacker, command, drain, greeting, null_handshake

TURN = {"role": "user", "content": "hello " * 40}


@dataclass(frozen=True)
class Clock:
    """Until when to go on, by CLOCK_MONOTONIC."""

    end_s: float

    def turns(self, pause_s: float = 0.0) -> Iterator[int]:
        """Count turns until the time is over."""
        number = 0
        while time.monotonic() < self.end_s:
            yield number
            number += 1
            if pause_s:
                time.sleep(pause_s)


Attack = Callable[[Attacker, Clock], None]


def connect_and_ask(attacker: Attacker, clock: Clock) -> None:
    """Control: connect, ask for the models, leave. It is what many well-behaved programs do."""
    for _ in clock.turns():
        peer = attacker.connect()
        attacker.say(peer, type="models")
        peer.poll(1000)
        peer.close(linger=0)


def claim_routing_ids(attacker: Attacker, clock: Clock) -> None:
    """Take the ids that libzmq would give to the next anonymous peers of a ROUTER, then connect as one of those."""
    first = _first_automatic_id()
    for turn in clock.turns(0.5):
        base = first + 200 * turn * attacker.strength
        ids = [b"\0" + struct.pack(">I", (base + offset) % 2**32) for offset in range(60 * attacker.strength)]
        held = [attacker.connect(each) for each in ids]
        for peer in held:
            attacker.say(peer, type="models")
        anonymous = attacker.connect()
        attacker.say(anonymous, type="models")
        anonymous.poll(500)
        for peer in (*held, anonymous):
            peer.close(linger=0)


def _first_automatic_id() -> int:
    """Return the first id of the second ROUTER of a fresh process: the gateway makes one for access control before."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    routers = [context.socket(zmq.ROUTER) for _ in range(2)]
    routers[1].bind("inproc://probe")
    peer = context.socket(zmq.DEALER)
    peer.connect("inproc://probe")
    peer.send(b"")
    name = routers[1].recv_multipart()[0]
    context.destroy(linger=0)
    return int(struct.unpack(">I", name[1:5])[0])


def guess_routing_ids(attacker: Attacker, clock: Clock) -> None:
    """Hold as many ids that begin with zero as one client may have connections, everywhere in their range."""
    rng = random.Random(1)
    held: list[zmq.Socket[bytes]] = []
    for _ in clock.turns(0.01):
        if len(held) < 200 * attacker.strength:
            held.append(attacker.connect(b"\0" + rng.randbytes(4)))
            attacker.say(held[-1], type="models")
        connect_once = attacker.connect()
        attacker.say(connect_once, type="models")
        connect_once.poll(50)
        connect_once.close(linger=0)


def empty_frames(attacker: Attacker, clock: Clock) -> None:
    """Send messages of millions of empty frames."""
    count = 2_000_000 * attacker.strength
    if attacker.key_file is not None:
        _empty_frames_with_key(attacker, clock, count)
        return
    block = b"\x01\x00" * 100_000
    for _ in clock.turns(0.1):
        with suppress(OSError), attacker.raw() as peer:
            attacker.write(peer, null_handshake())
            for _ in range(count // 100_000):
                attacker.write(peer, block)
            attacker.write(peer, b"\x00\x00")


def _empty_frames_with_key(attacker: Attacker, clock: Clock, count: int) -> None:
    for _ in clock.turns(0.1):
        peer = attacker.connect()
        with suppress(zmq.ZMQError):
            for _ in range(count // 10):
                peer.send(b"", zmq.SNDMORE)
            peer.send(b"")
        peer.poll(100)
        peer.close(linger=0)


def many_frames(attacker: Attacker, clock: Clock) -> None:
    """Send rows of messages of some thousand frames: each of them is small enough to be read at once."""
    peers = attacker.connect_many(4)
    frames = [VERSION, *[b""] * 5000]
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        if not attacker.send(peer, frames):
            time.sleep(0.001)
        drain(peer)


def half_hello(attacker: Attacker, clock: Clock) -> None:
    """Before any handshake: send all of a large command but its last byte, on many connections."""
    mechanism = b"NULL" if attacker.endpoint.startswith("ipc://") else b"CURVE"
    data = greeting(mechanism) + command(b"\x05HELLO".ljust(FRAME_BYTES - 16, b"x"))[:-1]
    while time.monotonic() < clock.end_s:
        _hold_half(attacker, clock, data, 250 * attacker.strength)


def _hold_half(attacker: Attacker, clock: Clock, data: bytes, count: int) -> None:
    from contextlib import ExitStack

    with ExitStack() as held:
        for _ in range(count):
            if time.monotonic() > clock.end_s:
                return
            with suppress(OSError):
                peer = held.enter_context(attacker.raw())
                attacker.write(peer, data)
        time.sleep(min(2.0, max(0.0, clock.end_s - time.monotonic())))


def idle_connections(attacker: Attacker, clock: Clock) -> None:
    """Keep many connections open that say nothing, some before and some after their handshake."""
    mute = [attacker.connect() for _ in range(250 * attacker.strength)]
    for _ in clock.turns(0.5):
        with suppress(OSError), attacker.raw() as peer:
            attacker.write(peer, b"\xff")
    del mute


def long_prompts(attacker: Attacker, clock: Clock) -> None:
    """Ask for the continuation of texts of a megabyte."""
    _ask_with(attacker, clock, 5, prompt="hello " * (FRAME_BYTES // 6 - 100), max_tokens=1)


def fitting_prompts(attacker: Attacker, clock: Clock) -> None:
    """Ask for the continuation of texts that just fit into the context, over and over, and cancel none."""
    _ask_with(attacker, clock, 5, prompt="hello " * 300, max_tokens=1)


def long_chats(attacker: Attacker, clock: Clock) -> None:
    """Send conversations of 300 turns, which no context holds."""
    _ask_with(attacker, clock, 5, messages=[TURN] * 300, max_tokens=1)


def large_token_lists(attacker: Attacker, clock: Clock) -> None:
    """Send a megabyte of token ids, which is refused for its length."""
    ids = array("i", [5] * (FRAME_BYTES // 4 - 100)).tobytes()
    _ask_with(attacker, clock, 5, prompt_ids=ids, max_tokens=1)


def bad_fields(attacker: Attacker, clock: Clock) -> None:
    """Send requests that are refused for one of their fields, with as much beside it as a message may hold."""
    _ask_with(attacker, clock, 5, prompt="x", temperature=-1, stop=["y" * 256] * 16, logit_bias=[[1, 1.0]] * 1000)


def _ask_with(attacker: Attacker, clock: Clock, connections: int, **fields: object) -> None:
    peers = attacker.connect_many(connections)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        if not attacker.say(peer, type="generate", **fields):
            time.sleep(0.001)
        drain(peer)


def questions(attacker: Attacker, clock: Clock) -> None:
    """Ask for the counters without end, from many connections."""
    peers = attacker.connect_many(20)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        attacker.say(peer, type="stats")
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
    session = "0123456789abcdef"
    attacker.say(peers[0], type="generate", id=1, session=session, prompt_ids=[5, 6, 7], max_tokens=300)
    for turn in clock.turns():
        peer = peers[turn % len(peers)]
        attacker.say(peer, type="resume", id=turn % 50 + 1, session=session, offsets=[0])
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


def random_sessions(attacker: Attacker, clock: Clock) -> None:
    """Mix all kinds of messages, valid and broken, finished and abandoned, on connections that come and go."""
    rng = random.Random(7)
    peers = attacker.connect_many(4)
    for _ in clock.turns():
        at = rng.randrange(len(peers))
        if rng.random() < 0.02:
            peers[at].close(linger=0)
            peers[at] = attacker.connect()
        _say_anything(attacker, peers[at], rng)
        if rng.random() < 0.8:
            drain(peers[at])


def _say_anything(attacker: Attacker, peer: "zmq.Socket[bytes]", rng: random.Random) -> None:
    number = rng.randrange(1, 40)
    ids = [rng.randrange(3, 40000) for _ in range(rng.choice([1, 5, 60, 600]))]
    kind = rng.randrange(9)
    if kind == 0:
        attacker.send(peer, [rng.randbytes(rng.randrange(0, 64)) for _ in range(rng.randrange(0, 8))] or [b""])
    elif kind == 1:
        attacker.say(peer, type="cancel", id=number)
    elif kind == 2:
        attacker.say(peer, type=rng.choice(["health", "stats", "models", "nonsense"]), id=number)
    elif kind == 3:
        attacker.say(peer, type="resume", id=number, session="0123456789abcdef", offsets=[rng.randrange(-1, 9)])
    elif kind == 4:
        attacker.say(peer, type="generate", id=number, prompt="x" * rng.randrange(1, 3000), max_tokens=5)
    elif kind == 5:
        attacker.say(peer, type="generate", id=number, messages=[TURN] * rng.randrange(1, 30), max_tokens=3)
    else:
        session = {"session": "0123456789abcdef"} if kind == 6 else {}
        attacker.say(
            peer, type="generate", id=number, prompt_ids=ids, max_tokens=rng.randrange(1, 60), stream=True,
            n=rng.choice([1, 1, 1, 3]), **session,
        )  # fmt: skip


ATTACKS: dict[str, Attack] = {
    attack.__name__.replace("_", "-"): attack
    for attack in (
        connect_and_ask,
        claim_routing_ids,
        guess_routing_ids,
        empty_frames,
        many_frames,
        half_hello,
        idle_connections,
        long_prompts,
        fitting_prompts,
        long_chats,
        large_token_lists,
        bad_fields,
        questions,
        submit_and_cancel,
        resume_flood,
        leave_in_the_middle,
        do_not_read,
        random_sessions,
    )
}
