"""Some choices of a request on one replica, and their answer, which is passed on as it comes."""

from collections.abc import Callable, Mapping

from mgpu.orchestrator.router.routed_request import RoutedRequest
from mgpu.protocol.client.answer import Answer
from mgpu.protocol.client.results import Usage
from mgpu.protocol.client.resumable import ResumableRequest
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


class Part:
    """Some choices of a request on one replica."""

    def __init__(
        self,
        routed: RoutedRequest,
        indexes: list[int],
        message: dict[str, object],
        on_end: Callable[["Part", Ending], None],
        on_tokens: Callable[["Part", Tokens], None],
    ) -> None:
        self.routed = routed
        self.indexes = indexes
        """Which choices of the client's request those of this part are."""
        self.has_tokens = False
        self.uncached_tokens = routed.prompt_size
        """Tokens of the prompt that its replica has still to compute, before the answer begins."""
        relay = Relay(message, lambda tokens: on_tokens(self, tokens), lambda ending: on_end(self, ending))
        self.relay = relay
        emitted = message.get("emitted_ids")
        if isinstance(emitted, bytes):
            relay.begin_after([len(emitted) // 4])
        self.request = ResumableRequest(message, answer=relay)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of a prompt that its replica has still to compute; 0 once the answer has begun."""
        return 0 if self.has_tokens else self.uncached_tokens
