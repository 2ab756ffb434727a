"""A server for clients: it binds the front socket and says what a test wants."""

from pathlib import Path
from typing import Any

import zmq

from mgpu.protocol.front import framing

DEADLINE_S = 60.0


class ScriptedServer:
    """Says what a test wants, to the connection on which the last message came."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.endpoint = f"ipc://{folder}/front"
        self._socket.bind(self.endpoint)
        self._connection = b""

    def wait_for_handshake(self) -> None:
        assert self._monitor.poll(int(DEADLINE_S * 1000)), "nobody connected in time"

    def has_message(self, seconds: float) -> bool:
        """Wait for a message, at most so long. Return True if there is one."""
        return bool(self._socket.poll(int(seconds * 1000)))

    def hear(self) -> dict[str, Any]:
        assert self._socket.poll(int(DEADLINE_S * 1000)), "nothing came in time"
        self._connection, *frames = self._socket.recv_multipart()
        return {str(name): value for name, value in framing.unpack(frames, framing.FROM_CLIENT).items()}

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart([self._connection, *frames])

    def say(self, **fields: object) -> None:
        """Send a message about request 1."""
        self.send(*framing.pack({"id": 1, **fields}))

    def say_tokens(self, *tokens: int, **more: object) -> None:
        self.say(type="tokens", index=0, token_ids=list(tokens), **{"text": "x" * len(tokens), **more})

    def say_the_end(self, token: int, **more: object) -> None:
        self.say_tokens(token, finish_reason="stop", **more)
        self.say(type="finished", finish_reasons=["stop"], prompt_tokens=1, completion_tokens=5, cached_tokens=0)

    def resume_and_finish(self, *tokens: int) -> dict[str, Any]:
        """Take one message, a resume, and answer it with some tokens, the last in a message of its own."""
        message = self.hear()
        self.say(type="resumed", offsets=message["offsets"])
        if tokens[:-1]:
            self.say_tokens(*tokens[:-1])
        self.say_the_end(tokens[-1])
        return message

    def close(self) -> None:
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()
