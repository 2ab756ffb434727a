"""Some choices of a request on one replica, and the state between router and replica."""

from collections.abc import Callable, Mapping
from functools import partial

from mgpu.orchestrator.router.requests.routed_request import RoutedRequest
from mgpu.protocol.client.requests.answer import Answer
from mgpu.protocol.client.requests.results import Usage
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front.server_messages import Finished, Tokens

Message = dict[object, object]
"""A message of a replica as it was decoded."""


class Part:
    """Some choices of a request on one replica."""

    def __init__(
        self,
        routed: RoutedRequest,
        indexes: list[int],
        message: Mapping[str, object],
        on_error: Callable[["Part", MgpuError], None],
        pass_on: Callable[["Part", Message], bool],
    ) -> None:
        """``pass_on`` handles what is said about the request while that goes on, and returns False for the rest."""
        self.routed = routed
        self.indexes = indexes
        """Which choices of the client's request those of this part are."""
        self.is_attached = False
        """Its client gets what is said about it."""
        self.has_tokens = False
        self.uncached_tokens = routed.prompt_size
        """Tokens of the prompt that its replica has still to compute, before the answer begins."""
        self._on_error = on_error
        self.request = ResumableRequest(message, answer=_Passed(self))
        self.request.relay = partial(pass_on, self)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of a prompt that its replica has still to compute; 0 once the answer has begun."""
        return 0 if self.has_tokens else self.uncached_tokens

    def offsets(self) -> list[int]:
        """Return how many tokens of each choice have come, -1 for one that has ended."""
        return [self.routed.choices[index].offset for index in self.indexes]

    def fail(self, error: MgpuError) -> None:
        """Take note of an error that ends the part."""
        self._on_error(self, error)


class _Passed(Answer):
    """An answer that has been passed on, so that nothing of it is kept here."""

    def __init__(self, part: Part) -> None:
        """Make nothing of what `Answer` keeps: it would be a twentieth of what a request costs the router."""
        self.accepted = None
        self.error = None
        self._part = part

    def offsets(self) -> list[int]:
        return self._part.offsets()

    def add(self, message: Tokens) -> None:
        pass

    def finish(self, message: Finished) -> None:
        pass

    def fail(self, error: MgpuError) -> None:
        self.error = error
        self._part.fail(error)

    def release(self, usage: Usage | None = None) -> None:
        pass
