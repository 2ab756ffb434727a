"""The stream of an `AsyncClient`: one answer, piece by piece."""

import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Self

from mgpu.protocol.client.backlog import Backlogs
from mgpu.protocol.client.requests.results import Completion, Piece
from mgpu.protocol.client.transport.async_connection import AsyncConnection
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.client.transport.wake import Wake
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front.server_messages import Accepted


class AsyncCompletionStream(AsyncIterator[Piece]):
    """Iterate over the pieces of one answer. Closing it, or dropping it unfinished, cancels the request.

    The request is sent when the first piece is awaited.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        request: ResumableRequest,
        timeout_s: float,
        backlogs: Backlogs | None = None,
    ) -> None:
        self._connection = connection
        self._request = request
        self._timeout_s = timeout_s
        self._deadline_s: float | None = None
        self._event = Wake()
        self._backlogs = backlogs
        self._request.notify = self._event.set if backlogs is None else _noting(backlogs, request, self._event)

    async def __anext__(self) -> Piece:
        """Wait for the next piece. RequestFailed, DeadlineExceeded or ServerUnreachable when there will be none."""
        answer = self._request.answer
        await self._begin()
        if not answer.pieces and not self._request.has_ended:
            await self._wait()
        if answer.pieces:
            return answer.pieces.popleft()
        if answer.error is not None:
            raise answer.error
        raise StopAsyncIteration

    @property
    def has_ended(self) -> bool:
        """True if no more will arrive. Pieces that have arrived can still be taken."""
        return self._request.has_ended and not self._request.answer.pieces

    async def accepted(self) -> Accepted:
        """Send the request and wait until the server has accepted it. The error of a request that it refuses."""
        answer = self._request.answer
        await self._begin()
        while answer.accepted is None and not answer.pieces and not self._request.has_ended:
            await self._wait(lambda: answer.accepted is not None)
        if answer.error is not None and answer.accepted is None:
            raise answer.error
        return answer.accepted or Accepted(self._request.id, "", 0, 0, 0)

    async def take(self, longest_s: float) -> list[Piece]:
        """Return the pieces that have arrived. If there are none, wait for the next one, ``longest_s`` at most.

        Empty at the end of the answer, or if nothing has come in time. The error of a request that failed.
        """
        answer = self._request.answer
        await self._begin()
        if not answer.pieces and not self._request.has_ended:
            until_s = time.monotonic() + longest_s
            await self._wait(lambda: time.monotonic() >= until_s, longest_s)
        if not answer.pieces and answer.error is not None:
            raise answer.error
        if self._backlogs is None:
            return answer.take(0)
        pieces = answer.take(self._backlogs.bounds.portion)
        self._backlogs.count(self._request.id, answer)
        return pieces

    async def completion(self) -> Completion:
        """Wait for the end and return the whole answer, whether or not pieces were taken."""
        try:
            await self._begin()
            while not self._request.has_ended:
                await self._wait()
                self._request.answer.pieces.clear()
        finally:
            await self.aclose()  # after an error or when the awaiting task is cancelled
        return self._request.answer.completion()

    async def aclose(self) -> None:
        """Cancel what is still to come; a second call does nothing."""
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncCompletionStream({self._request.described()})"

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        self._connection.cancel(self._request)
        if self._backlogs is not None:
            self._backlogs.forget(self._request.id)

    async def _begin(self) -> None:
        if self._deadline_s is None and not self._request.has_ended:
            self._deadline_s = time.monotonic() + self._timeout_s
            await self._connection.begin(self._request, self._timeout_s)

    async def _wait(self, enough: Callable[[], bool] = lambda: False, longest_s: float = math.inf) -> None:
        """Wait for a piece, the end, or ``enough``. If time runs out, cancel the request and raise."""
        assert self._deadline_s is not None
        self._request.answer.is_awaited = True
        try:
            for seconds in self._connection.waits_for(self._request, self._deadline_s):
                self._event.clear()
                await self._event.wait(min(seconds, longest_s))
                if self._request.is_interrupted or not self._event.is_set():
                    self._connection.read()
                if enough():
                    return
        except MgpuError:
            await self.aclose()
            raise
        finally:
            self._request.answer.is_awaited = False


def _noting(backlogs: Backlogs, request: ResumableRequest, event: Wake) -> Callable[[], None]:
    """Return what is called at news. It must not hold the stream or the request, which end when they are dropped."""
    request_id, answer = request.id, request.answer

    def note() -> None:
        backlogs.note(request_id, answer)
        event.set()

    return note
