"""A peer of the front channel that keeps to no rule."""

import contextlib
import socket
from typing import Any

import msgpack
import zmq

from harness.servers.gateway_process import DEADLINE_S
from mgpu.protocol.front.framing import VERSION


class RawPeer:
    """A DEALER that sends whatever it is told."""

    def __init__(self, endpoint: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def say(self, **fields: Any) -> None:
        self.send(VERSION, msgpack.packb(fields))

    def hear(self) -> dict[str, Any]:
        assert self.socket.poll(int(DEADLINE_S * 1000)), "no answer in time"
        version, body = self.socket.recv_multipart()
        assert version == VERSION
        message: dict[str, Any] = msgpack.unpackb(body)
        return message

    def hear_answer(self) -> dict[str, Any]:
        """Return the next message that says more than that the server is alive."""
        while (message := self.hear())["type"] == "keepalive":
            pass
        return message

    def hear_until(self, kind: str) -> dict[str, Any]:
        """Return the first message of a kind; those before it are dropped."""
        while (message := self.hear())["type"] != kind:
            pass
        return message

    def hear_all(self, request_id: int) -> list[dict[str, Any]]:
        """Collect the messages of one request up to its terminal one."""
        messages: list[dict[str, Any]] = []
        while not messages or messages[-1]["type"] not in ("finished", "failed"):
            message = self.hear()
            if message.get("id") == request_id:
                messages.append(message)
        return messages

    def close(self) -> None:
        self.socket.close()
        self.context.term()


def read_until_closed(raw: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := raw.recv(4096):
            received += chunk
    return received
