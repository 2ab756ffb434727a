"""Decide who may connect: the handler that libzmq asks for every handshake (ZAP, RFC 27).

Without a ZAP domain libzmq also accepts ZMTP/1.0 greetings, so that sixteen raw bytes on a TCP port would arrive as
a message; with one they are rejected. On ipc the kernel tells the peer's uid, which must be ours or root's.
"""

import os

import zmq

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"mgpu"


class Doorkeeper:
    """Answers libzmq's questions in the gateway's own loop; owns the ZAP socket."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)

    def answer(self) -> None:
        """Answer every question that is waiting."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            split = frames.index(b"") + 1
            route, question = frames[:split], frames[split:]
            verdict = allows(question)
            status = [b"200", b"OK"] if verdict else [b"400", b"refused"]
            request_id = question[1] if len(question) > 1 else b""
            self.socket.send_multipart([*route, b"1.0", request_id, *status, b"", b""])

    def close(self) -> None:
        self.socket.close()


def allows(question: list[bytes]) -> bool:
    """Tell whether a ZAP request is from a peer that may use the front channel."""
    if len(question) < 6 or question[0] != b"1.0" or question[2] != DOMAIN or question[5] != b"NULL":
        return False
    address = question[3].decode("latin-1")
    if address.startswith("localhost:"):  # ipc: localhost:uid:gid:pid from the kernel
        uid = address.split(":")[1]
        return uid.isdigit() and int(uid) in (0, os.getuid())
    return address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")
