"""The stream of one answer, as `Client.stream` returns it."""

from collections.abc import Iterator
from typing import Self

from mgpu.protocol.client.requests.results import Completion, Piece
from mgpu.protocol.client.transport.connection import Connection
from mgpu.protocol.client.transport.resumable import ResumableRequest


class CompletionStream(Iterator[Piece]):
    """Iterate over the pieces of one answer. Closing it, or dropping it unfinished, cancels the request."""

    def __init__(self, connection: Connection, request: ResumableRequest, deadline_s: float) -> None:
        self._connection = connection
        self._request = request
        self._deadline_s = deadline_s

    def __next__(self) -> Piece:
        """Wait for the next piece. RequestFailed, DeadlineExceeded or ServerUnreachable when there will be none."""
        answer = self._request.answer
        if not answer.pieces and not self._request.has_ended:
            self._connection.wait_for(self._request, self._deadline_s)
        if answer.pieces:
            return answer.pieces.popleft()
        if answer.error is not None:
            raise answer.error
        raise StopIteration

    def completion(self) -> Completion:
        """Wait for the end and return the whole answer, whether or not pieces were taken."""
        while not self._request.has_ended:
            self._connection.wait_for(self._request, self._deadline_s)
            self._request.answer.pieces.clear()
        return self._request.answer.completion()

    def close(self) -> None:
        """Cancel what is still to come; a second call does nothing."""
        self._connection.cancel(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CompletionStream({self._request.described()})"

    def __del__(self) -> None:
        self._connection.drop(self._request)
