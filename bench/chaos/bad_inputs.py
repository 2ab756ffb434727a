"""Bad inputs beside streams that go on: fields out of bounds, frames that are no message, bytes that are no frame.

Each must be refused, or ignored where nobody can be told; after each wave a good request gets its usual answer, and in
the end the server has no more memory and descriptors than after its first wave.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress

import msgpack
import psutil
import zmq

from bench.chaos.load import STANDSTILL_S, Streams
from bench.chaos.server import Server
from bench.chaos.table import Row
from bench.waiting import wait_until
from mgpu import Client

MIB = 1 << 20
CONTEXT = 512
"""Of the server: a prompt of so many tokens leaves no room for an answer."""
GROWTH = 8 * MIB
"""Of a process between its first wave and its last; workers apart, which settle slowly and hear of none of this."""
BACK_S = 10.0
VERSION = b"mgpu1"
TURN = {"role": "user", "content": "x"}

FIELDS: list[dict[str, object]] = [
    {"n": 0},
    {"n": 10**9},
    {"max_tokens": -1},
    {"max_tokens": 2**63},
    {"max_tokens": 2**31 - 1},
    {"max_tokens": "many"},
    {"logprobs": 10**6},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 0},
    {"top_k": -2},
    {"presence_penalty": 1e308},
    {"repetition_penalty": 0},
    {"logit_bias": [[at, 1.0] for at in range(4000)]},
    {"logit_bias": [[2**31 - 1, 1.0]]},
    {"logit_bias": [["a", 1.0]]},
    {"logit_bias": [[1, float("-inf")]]},
    {"stop": ["s"] * 10_000},
    {"stop": [""]},
    {"stop": ["s" * 100_000]},
    {"seed": -1},
    {"seed": "1"},
    {"priority": 1001},
    {"timeout_s": 0},
    {"session": "short"},
    {"model": "m" * 100_000},
    {"model": "../../etc/passwd"},
    {"temprature": 1.0},
    {"response_format": {"type": "json_schema"}},
    {"prompt_ids": []},
    {"prompt_ids": b"123"},
    {"prompt_ids": [1.5]},
    {"prompt_ids": [True]},
    {"prompt_ids": [-1]},
    {"prompt_ids": [2**31 - 1]},
    {"prompt_ids": [5] * CONTEXT},
    {"prompt_ids": [5] * 60_000},
    {"prompt": ""},
    {"prompt": "<|im_end|>" * 20_000},
    {"prompt": "x", "prompt_ids": [5]},
    {"messages": []},
    {"messages": [TURN] * 3000},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "wizard", "content": ""}]},
    {"messages": [5]},
    {"messages": [TURN], "template_options": "tokenize"},
    {"type": "gernate"},
    {"type": "tokens", "index": 0},
    {"type": "health", "prompt": "x"},
    {"type": "resume", "session": "0" * 16, "offsets": [0]},
    {"type": "resume", "session": "0" * 16, "offsets": [-1] * 100},
]
"""Of a `generate` with one token as its prompt, unless they say otherwise."""

FRAMES: list[tuple[bytes, ...]] = [
    (b"",),
    (VERSION,),
    (b"mgpu0", b"x"),
    (VERSION, b"x", b"x"),
    (VERSION, *[b"x"] * 1000),
    *(
        (VERSION, body)
        for body in (
            b"",
            b"\xc1",
            msgpack.packb([1, 2]),
            msgpack.packb({1: 2}),
            msgpack.packb({"type": "health", "id": 1})[:-1],
            msgpack.packb({"type": "health", "id": 1}) + b"\x00",
            msgpack.packb({"type": "health", "id": -1}),
            msgpack.packb({"type": "health", "id": msgpack.ExtType(5, b"x")}),
            msgpack.packb({"type": "health", "id": msgpack.Timestamp(0)}),
            b"\x81\xa4type\xa3\xed\xa0\x80",  # half of a surrogate pair
            b"\x91" * 100_000 + b"\xc0",  # nested
            b"\xdd" + struct.pack(">I", 2**31) + b"\x90" * 100,  # a length that nobody can hold
            b"\x81\xa1x\xdc\xff\xff" + b"\x90" * 65_535,  # a thousand times its size when it is built
        )
    ),
]
"""Whatever they are, the answer has no id that it could belong to."""

STREAMS_OF_BYTES = (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x01\x00\x0d\x00hello-forged", b"\xff" * 10)


def send_bad_inputs(server: Server, streams: Streams, count: int) -> Row:
    """Send waves of everything above until ``count`` were sent."""
    row = Row("bad fields, frames and bytes")
    with Client(server.endpoint, silence_timeout_s=STANDSTILL_S) as good, Peer(server.endpoint) as peer:
        usual = _ask(good)
        first = peer.send_wave(row)  # what each process keeps once it has needed it
        before = Footprint(server)
        row.injected(count=first)
        while row.injections < count:
            began_s = time.monotonic()
            sent = peer.send_wave(row)
            found = _ask(good)
            row.finished += 1
            row.tokens += len(found)
            row.different += found != usual
            row.injected(time.monotonic() - began_s, count=sent)
        before.compare(row)
    return row


def _ask(client: Client) -> tuple[int, ...]:
    return client.generate([5, 6, 7], max_tokens=4, ignore_eos=True).token_ids


class Peer:
    """A connection that keeps to no rule; a context manager."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._connect()
        self._last_id = 0

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def _connect(self) -> "zmq.Socket[bytes]":
        found = self._context.socket(zmq.DEALER)
        found.connect(self._endpoint)
        return found

    def send_wave(self, row: Row) -> int:
        """Send one of each and note what was not refused; gives how many that were."""
        self._send_fields(row)
        self._send_frames(row)
        self._send_too_large_a_frame(row)
        for data in (*STREAMS_OF_BYTES, os.urandom(4096)):
            with socket.socket(socket.AF_UNIX) as raw, suppress(BrokenPipeError, ConnectionResetError):
                raw.connect(self._endpoint.removeprefix("ipc://"))
                raw.sendall(data)
        return len(FIELDS) + len(FRAMES) + 1 + len(STREAMS_OF_BYTES) + 1

    def _send_fields(self, row: Row) -> None:
        unanswered: dict[object, dict[str, object]] = {}
        for fields in FIELDS:
            self._last_id += 1
            has_prompt = fields.keys() & {"prompt", "prompt_ids", "messages", "type"}
            prompt = {} if has_prompt else {"prompt_ids": [5]}
            body = {"type": "generate", "id": self._last_id, **prompt, **fields}
            self._socket.send_multipart([VERSION, msgpack.packb(body)])
            unanswered[self._last_id] = fields
        for answer in self._answers(len(FIELDS)):
            of = unanswered.pop(answer.get("id"), None)
            if of is None or not _is_refusal(answer):
                row.problems.append(f"{str(of)[:80]} was answered with {str(answer)[:200]}")
        row.problems += [f"{str(fields)[:80]} was not answered" for fields in unanswered.values()]

    def _send_frames(self, row: Row) -> None:
        for frames in FRAMES:
            self._socket.send_multipart(frames)
            for answer in self._answers(1):
                if not _is_refusal(answer) or "id" in answer:
                    row.problems.append(f"{str(frames)[:80]} was answered with {str(answer)[:200]}")
                break
            else:
                row.problems.append(f"{str(frames)[:80]} was not answered")

    def _send_too_large_a_frame(self, row: Row) -> None:
        """It ends its connection, without a word; libzmq makes another one."""
        known, self._socket = self._socket, self._connect()
        for frames in ((), (VERSION, b"x" * (MIB + 1))):
            if frames:
                self._socket.send_multipart(frames)
            self._socket.send_multipart([VERSION, msgpack.packb({"type": "health", "id": 1})])
            if [answer["type"] for answer in self._answers(1)] != ["health"]:
                row.problems.append("a connection was of no use after too large a frame")
        self._socket.close(linger=0)
        self._socket = known

    def _answers(self, count: int) -> Iterator[dict[str, object]]:
        """Return ``count`` answers, or fewer if no more come in time."""
        while count:
            if not self._socket.poll(int(STANDSTILL_S * 1000)):
                return
            answer = msgpack.unpackb(self._socket.recv_multipart()[1])
            if answer["type"] != "keepalive":  # a long text waits for a process that can be ended
                count -= 1
                yield answer


def _is_refusal(answer: dict[str, object]) -> bool:
    return answer["type"] == "failed" and answer["code"] in (
        "bad_request",
        "bad_version",
        "unknown_model",
        "unknown_request",
    )


class Footprint:
    """Memory and descriptors of every process of a server, to be compared later."""

    def __init__(self, server: Server) -> None:
        self._of = {
            name: (process, process.memory_info().rss, process.num_fds()) for name, process in server.everyone().items()
        }

    def compare(self, row: Row) -> None:
        """Note what has grown, and what everything had and has."""
        for name, (process, rss, descriptors) in self._of.items():
            with suppress(psutil.NoSuchProcess):
                if not wait_until(lambda: process.num_fds() <= descriptors, BACK_S):  # noqa: B023
                    row.problems.append(f"{name} had {descriptors} descriptors and has {process.num_fds()}")
                now = process.memory_info().rss
                if now - rss > GROWTH and not name.startswith("worker"):
                    row.problems.append(f"{name} had {rss >> 10} KB and has {now >> 10} KB")
                row.notes.append(f"{name}: {rss >> 10} KB and {descriptors} descriptors, then {now >> 10} KB")
                continue
            row.problems.append(f"{name} has ended")
