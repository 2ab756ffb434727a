"""How long a client waits, and when it gives up. Shared by the sync and the asyncio client.

Each function is a generator of seconds. The client waits that long at most for its socket, reads what has arrived and
takes the next number. The generator ends when the awaited thing is there, and raises MgpuError when it gives up:

    for seconds in until_connected(session, timeouts):
        poller.poll(seconds * 1000)
        session.receive()
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.client.transport.session import Session
from mgpu.protocol.errors import DeadlineExceeded, MgpuError

DEFAULT_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 15.0
"""The server says something about every request each second; after this much silence it is taken for dead."""
QUERY_TIMEOUT_S = 5.0
RETRIES = 10
"""How often a request that an overloaded server refuses is sent again."""
_LOOK_S = 0.5
"""The longest wait at once, so that a process that was stopped meanwhile notices it."""
_LATE_S = 0.5
_CHECK_S = 0.25
"""While the connection is lost: how often to look if the server has ended, or if a busy one can be asked again."""


@dataclass(frozen=True, slots=True)
class ClientTimeouts:
    """The longest times that one client waits, in seconds."""

    request_s: float
    """For a whole answer, if the call names no ``timeout_s``."""
    connect_s: float
    silence_s: float


def _stood_still(asked_s: float, wait_s: float) -> float:
    """Return for how many seconds this process did not run, 0 if it did: it was stopped (Ctrl-Z), or busy elsewhere."""
    late_s = time.monotonic() - asked_s - wait_s
    return late_s if late_s > _LATE_S else 0.0


def until_connected(session: Session, timeouts: ClientTimeouts, longest_s: float = math.inf) -> Iterator[float]:
    """Wait for the handshake, the first one or that after a disconnection. ServerUnreachable if there is none.

    ``longest_s`` is the time of the call that needs the connection.
    """
    channel = session.channel
    timeout_s = min(timeouts.silence_s if channel.was_connected else timeouts.connect_s, longest_s)
    deadline_s = time.monotonic() + timeout_s
    while not channel.is_connected:
        left_s = deadline_s - time.monotonic()
        if channel.refusal is not None:
            raise channel.refusal
        if left_s <= 0:
            raise channel.unreachable(f"did not answer within {timeout_s:g} s")
        if channel.server_has_ended():
            raise channel.ended()
        now, wait_s = time.monotonic(), min(left_s, _CHECK_S)
        yield wait_s
        deadline_s += _stood_still(now, wait_s)


def until_progress(
    session: Session, request: ResumableRequest, deadline_s: float, timeouts: ClientTimeouts
) -> Iterator[float]:
    """Wait for a piece of the answer or its end. DeadlineExceeded, or ServerUnreachable after too much silence.

    Silence counts only while this process runs: it could not have heard anything while it was stopped.
    """
    _begin_to_listen([request])
    while not request.answer.pieces and not request.has_ended:
        if (error := overdue(session, request, deadline_s, timeouts)) is not None:
            raise error
        now, wait_s = time.monotonic(), _wait_for(session, request, deadline_s, timeouts)
        yield wait_s
        if _stood_still(now, wait_s):
            _begin_to_listen([request])


def until_one_ends(
    session: Session, deadlines_s: Mapping[ResumableRequest, float], timeouts: ClientTimeouts
) -> Iterator[float]:
    """Wait until one of several requests has ended, or is `overdue`."""
    _begin_to_listen(deadlines_s)
    while not any(request.has_ended for request in deadlines_s):
        if any(overdue(session, request, at_s, timeouts) for request, at_s in deadlines_s.items()):
            return
        now = time.monotonic()
        wait_s = min(_wait_for(session, request, at_s, timeouts) for request, at_s in deadlines_s.items())
        yield wait_s
        if _stood_still(now, wait_s):
            _begin_to_listen(deadlines_s)


def overdue(
    session: Session, request: ResumableRequest, deadline_s: float, timeouts: ClientTimeouts
) -> MgpuError | None:
    """Return the error of a request that has taken too long, or of which nothing was heard for too long."""
    now = time.monotonic()
    if now >= deadline_s:
        text = "the answer was not complete within timeout_s; the request has been cancelled"
        return DeadlineExceeded(text, request.answer.partial())
    if now >= request.heard_s + timeouts.silence_s:
        return session.channel.silent(timeouts.silence_s)
    return None


def _begin_to_listen(requests: Iterable[ResumableRequest]) -> None:
    """Let silence count from now on."""
    now = time.monotonic()
    for request in requests:
        request.heard_s = max(request.heard_s, now)


def _wait_for(session: Session, request: ResumableRequest, deadline_s: float, timeouts: ClientTimeouts) -> float:
    left_s = min(deadline_s, request.heard_s + timeouts.silence_s) - time.monotonic()
    return min(left_s, _CHECK_S if request.is_interrupted else _LOOK_S, session.until_retry_s())


def until_reply(
    session: Session, query_id: int, silence_s: float = QUERY_TIMEOUT_S, timeout_s: float = QUERY_TIMEOUT_S
) -> Iterator[float]:
    """Wait for the reply to a query. ServerUnreachable after too much silence, DeadlineExceeded after ``timeout_s``."""
    started_s = time.monotonic()
    deadline_s = started_s + timeout_s
    while not session.has_reply(query_id):
        now = time.monotonic()
        left_s = max(started_s, session.heard_s(query_id)) + silence_s - now
        if left_s <= 0 or not session.channel.is_connected:
            raise session.channel.unreachable("does not answer")
        if now >= deadline_s:
            raise DeadlineExceeded(f"the server did not answer within timeout_s {timeout_s:g}")
        wait_s = min(left_s, deadline_s - now, _LOOK_S)
        yield wait_s
        if stood_s := _stood_still(now, wait_s):
            started_s = time.monotonic()
            deadline_s += stood_s
