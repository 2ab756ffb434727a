"""What a server that sends on the requests of many clients has beside its connection: who may send next."""

from typing import Protocol


class Window(Protocol):
    """Bounds the messages that the server has not said anything about."""

    async def enter(self, message_id: int, longest_s: float) -> None:
        """Return when a request or query may be sent. RequestFailed `overloaded` if it may not within ``longest_s``."""

    def leave(self, message_id: int) -> None:
        """Note that the server has read a message, or that it was not sent after all. Any id may come, and again."""

    def leave_all(self) -> None:
        """Note that the server will say nothing about what it was sent: the connection is lost."""
