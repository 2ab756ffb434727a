"""Refuse what a client asks for."""

from mgpu.protocol.front.server_messages import Failed, FailureCode

RETRY_AFTER_S = 1.0
"""What clients are told to wait where nothing better is known."""


class Refusal(Exception):
    """A request or a question is not served; the text is for its client."""

    def __init__(self, code: FailureCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s

    def answer(self, request_id: int | None) -> Failed:
        """Return the message that tells the client."""
        return Failed(request_id, self.code, str(self), self.retry_after_s)
