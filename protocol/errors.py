"""Errors that callers of mgpu's clients see."""


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


class ServerUnreachable(MgpuError):
    """No server is running, or the connection to it was lost for good."""


class DeadlineExceeded(MgpuError):
    """The request took longer than its ``timeout_s``; it has been cancelled."""
