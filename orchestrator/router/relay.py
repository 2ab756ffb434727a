"""The answer of a replica, which is passed on as it comes."""

from collections.abc import Callable, Mapping

from mgpu.protocol.client.answer import Answer
from mgpu.protocol.client.results import Usage
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front.server_messages import Finished, Tokens

Ending = Finished | MgpuError
"""How a part of a request ends."""


class Relay(Answer):
    """Passes on what arrives instead of keeping it for a caller."""

    def __init__(
        self, message: Mapping[str, object], on_tokens: Callable[[Tokens], None], on_end: Callable[[Ending], None]
    ) -> None:
        super().__init__(message)
        self._on_tokens, self._on_end = on_tokens, on_end

    def begin_after(self, offsets: list[int]) -> None:
        """Count tokens that have arrived earlier; -1: all of them, and the finish reason."""
        for choice, offset in zip(self._choices, offsets, strict=True):
            choice.token_ids, choice.has_ended = [0] * max(0, offset), offset < 0

    def add(self, message: Tokens) -> None:
        super().add(message)
        self._on_tokens(message)

    def finish(self, message: Finished) -> None:
        super().finish(message)
        self._on_end(message)

    def fail(self, error: MgpuError) -> None:
        super().fail(error)
        self._on_end(error)

    def release(self, usage: Usage | None = None) -> None:
        self.pieces.clear()
        self._last = None
