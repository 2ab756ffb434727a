"""Everything that the gateway says, to clients and to the engine."""

from typing import Any

import zmq

from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.protocol.front.server_messages import ServerMessage, to_map
from mgpu.protocol.internal.gateway_messages import LINK


class Outgoing:
    """Sends without ever waiting: what a client does not read is kept for it, and the engine always reads."""

    def __init__(self, front: FrontSocket, link: "zmq.Socket[Any]") -> None:
        self._front = front
        self._link = link

    def to_client(self, connection: bytes, message: ServerMessage) -> None:
        self._front.send(connection, to_map(message))

    def to_engine(self, message: object) -> None:
        """Send one of the messages of `LINK`."""
        self._link.send(LINK.encode(message))
