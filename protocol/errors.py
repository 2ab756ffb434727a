"""Errors that callers of mgpu's clients see."""

from typing import Protocol


class PartialAnswer(Protocol):
    """What had arrived of an answer; a `Completion`."""

    @property
    def text(self) -> str:
        """The text of the first choice."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids of the first choice."""

    def to_dict(self) -> dict[str, object]:
        """Return all fields, fit for JSON."""


class MgpuError(Exception):
    """The base class of all errors that a client raises."""


class RequestFailed(MgpuError):
    """A request was refused or ended, by the server or by a check before sending.

    ``code`` is one of `mgpu.protocol.front.server_messages.FailureCode`.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.code, str(self), self.retry_after_s)


class ServerStopped(RequestFailed, ConnectionError):
    """The server ended while it answered (code ``stopped``). Also a ConnectionError, as `ServerUnreachable` is."""


class ServerUnreachable(MgpuError, ConnectionError):
    """No server is running, or the connection to it was lost for good."""


class DeadlineExceeded(MgpuError, TimeoutError):
    """The request took longer than its ``timeout_s``; it has been cancelled."""

    def __init__(self, message: str, partial: PartialAnswer | None = None) -> None:
        super().__init__(message)
        self.partial = partial
        """What had arrived of the answer. A request that does not stream gets a choice at its end only."""

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.partial)
