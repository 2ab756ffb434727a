"""Some choices of a request on one replica."""

from collections.abc import Callable

from mgpu.orchestrator.router.relay import Ending, Relay
from mgpu.orchestrator.router.routed_request import RoutedRequest
from mgpu.protocol.client.resumable import ResumableRequest
from mgpu.protocol.front.server_messages import Tokens


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
