"""Attacks on connections: routing ids, frames, handshakes, and peers that have not proven who they are."""

import random
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import msgpack
import zmq

from bench.attack.attacks.clock import Clock
from bench.attack.peers import FRAME_BYTES, VERSION, Attacker, command, drain, greeting, null_handshake
from mgpu.protocol.keys import ClientKeys, new_pair, read_client_keys, use_client_keys


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


def routing_id_in_use(attacker: Attacker, clock: Clock) -> None:
    """Connect again and again under one routing id, send what nobody will read, and leave."""
    holder = attacker.connect(b"taken")
    attacker.say(holder, type="models")
    holder.poll(1000)
    for turn in clock.turns():
        peers = [attacker.connect(b"taken", heartbeat_ms=1000) for _ in range(4 * attacker.strength)]
        for peer in peers:
            for _ in range(100):
                attacker.say(peer, type="models" if turn % 2 else "x" * 100_000)
        time.sleep(min(0.05, clock.left_s))
        for peer in peers:
            peer.close(linger=0)


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
    while clock.left_s:
        with ExitStack() as held:
            _open(held, attacker, clock, data, 250 * attacker.strength)
            time.sleep(min(2.0, clock.left_s))


def slow_hello(attacker: Attacker, clock: Clock) -> None:
    """Before any handshake: send one byte of it after another, on many connections."""
    data = greeting(b"NULL" if attacker.endpoint.startswith("ipc://") else b"CURVE")
    while clock.left_s:
        with ExitStack() as held:
            peers = _open(held, attacker, clock, data[:1], 100 * attacker.strength)
            for byte in data[1:40]:
                for peer in peers:
                    with suppress(OSError):
                        attacker.write(peer, bytes([byte]))
                time.sleep(min(0.1, clock.left_s))


def _open(held: ExitStack, attacker: Attacker, clock: Clock, data: bytes, count: int) -> "list[socket.socket]":
    """Open plain connections and send ``data`` on each; as many as the server takes."""
    peers = []
    for _ in range(count):
        if not clock.left_s:
            break
        with suppress(OSError):
            peers.append(held.enter_context(attacker.raw()))
            attacker.write(peers[-1], data)
    return peers


def connect_and_reset(attacker: Attacker, clock: Clock) -> None:
    """Open plain connections and reset them, before and in the middle of the handshake."""
    for turn in clock.turns():
        with suppress(OSError), attacker.raw() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            attacker.write(peer, null_handshake()[: (0, 10, 64, 80)[turn % 4]] or b"\xff")
        if turn % (20 * attacker.strength) == 0:
            time.sleep(0.001)


def ping_and_close(attacker: Attacker, clock: Clock) -> None:
    """Send questions and ZMTP PINGs in turns, as fast as they are taken, and leave without reading an answer."""
    for _ in clock.turns():
        for _ in range(attacker.strength):
            if attacker.key_file is None:
                _ping_and_close(attacker)
            else:
                _ping_and_close_with_key(attacker, min(0.2, clock.left_s))


def _ping_and_close(attacker: Attacker) -> None:
    ask = msgpack.packb({"type": "health", "id": 1})
    message = bytes([1, len(VERSION)]) + VERSION + bytes([0, len(ask)]) + ask
    with suppress(OSError), attacker.raw() as peer:
        attacker.write(peer, null_handshake())
        while b"READY" not in (heard := peer.recv(4096)):
            if not heard:
                return
        peer.settimeout(0.1)
        attacker.write(peer, (message + b"\x04\x07\x04PING\0\0") * 3000)


def _ping_and_close_with_key(attacker: Attacker, seconds: float) -> None:
    """Let libzmq send a heartbeat each millisecond: encrypted commands cannot be mixed in otherwise."""
    peer = attacker.connect(unread=0, heartbeat_ms=1)
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        attacker.say(peer, type="health")
    peer.close(linger=0)


def garbage_bytes(attacker: Attacker, clock: Clock) -> None:
    """Send what other protocols send, random bytes, and frames that claim to be huge."""
    rng = random.Random(3)
    starts = (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\x01\x00\x0d\x00forged", b"\xff" * 64,
        null_handshake() + b"\x02" + struct.pack(">Q", 1 << 62),
        null_handshake() + b"\x06" + struct.pack(">Q", 1 << 30),
    )  # fmt: skip
    for _ in clock.turns():
        for _ in range(attacker.strength):
            with suppress(OSError), attacker.raw() as peer:
                attacker.write(peer, rng.choice(starts) + rng.randbytes(rng.randrange(300)))
        time.sleep(0.0005)


def unlisted_keys(attacker: Attacker, clock: Clock) -> None:
    """On tcp: prove a key that is not on the list, or talk to the wrong server key; on ipc: reconnect in a loop."""
    server = read_client_keys(attacker.key_file).server if attacker.key_file is not None else None
    for _ in clock.turns():
        peers = [_stranger(attacker, server) for _ in range(5 * attacker.strength)]
        for peer in peers:
            with suppress(zmq.Again):
                peer.send_multipart([VERSION, b"\x80"], zmq.NOBLOCK)
        time.sleep(min(0.05, clock.left_s))
        for peer in peers:
            peer.close(linger=0)


def _stranger(attacker: Attacker, server: bytes | None) -> "zmq.Socket[bytes]":
    peer = attacker.context.socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    if server is not None:
        public, secret = new_pair()
        use_client_keys(peer, ClientKeys(secret, public, server))
    peer.connect(attacker.endpoint)
    attacker.cost.connections += 1
    return peer


def idle_connections(attacker: Attacker, clock: Clock) -> None:
    """Keep many connections open that say nothing, some before and some after their handshake."""
    mute = [attacker.connect() for _ in range(300 * attacker.strength)]
    for _ in clock.turns(0.5):
        with suppress(OSError), attacker.raw() as peer:
            attacker.write(peer, b"\xff")
    for peer_of_ours in mute:
        peer_of_ours.close(linger=0)


CONNECTIONS: tuple[Callable[[Attacker, Clock], None], ...] = (
    connect_and_ask, claim_routing_ids, guess_routing_ids, routing_id_in_use, empty_frames, many_frames, half_hello,
    slow_hello, connect_and_reset, ping_and_close, garbage_bytes, unlisted_keys, idle_connections,
)  # fmt: skip
