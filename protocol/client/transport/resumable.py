"""One request and its answer, across lost connections. No I/O: methods return the message that has to be sent.

Theory. A request belongs to the connection on which it was sent. When that is lost, the client makes another and sends
`resume` with the number of tokens that it has (its offsets). The server answers `resumed` with the same offsets, and
all that follows continues the answer. Whatever comes before `resumed` will come again, so the client skips it. If the
server does not know the request and no token has arrived, the client sends `generate` again.

Example: 3 tokens have arrived when the gateway dies.

    event                                  sent                    state
    generate is sent                       generate                RUNNING
    tokens (3), then the connection fails                          DISCONNECTED
    a new gateway accepts the connection   resume, offsets [3]     RESUMING
    tokens, of an earlier connection                               RESUMING (skipped: they come again)
    failed, overloaded, retry after 1 s                            BUSY
    1 s later                              resume, offsets [3]     RESUMING
    resumed, offsets [3]                                           RESUMED
    tokens (2), finished                                           ENDED

A `resume` that still waits in the socket when its connection is lost goes out on the next one, so the server may answer
several. A `resumed` whose offsets are not those that the client has now is skipped, and the client asks again.
"""

import math
import time
from collections.abc import Callable, Mapping
from enum import Enum, auto

from mgpu.protocol.client.requests.answer import Answer
from mgpu.protocol.errors import DeadlineExceeded, MgpuError, RequestFailed, ServerStopped, ServerUnreachable
from mgpu.protocol.front.server_messages import Accepted, Failed, Finished, Keepalive, Resumed, ServerMessage, Tokens

RETRY_S = 1.0
"""When to ask a busy server again if it does not say."""

_LOST_TWICE = (
    "the server has lost this request twice before it accepted it; it is not sent a third time, because it may be what "
    "ends the process that reads it"
)

Message = Mapping[str, object]


class RequestState(Enum):
    RUNNING = auto()
    """`generate` was sent; the server answers it."""
    DISCONNECTED = auto()
    """The connection was lost; `resume` goes out on the next one."""
    RESUMING = auto()
    """`resume` was sent and not answered yet."""
    BUSY = auto()
    """The server refused `resume` for now; it is asked again after a while."""
    RESUMED = auto()
    """The server continues the answer."""
    ENDED = auto()
    """No more messages are expected: finished, failed or cancelled."""


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    # What leads to each state: the loss of a connection to DISCONNECTED, a sent `resume` to RESUMING, the answers to it
    # to RESUMED, BUSY or, after unknown_request and a second `generate`, RUNNING.
    RequestState.RUNNING: frozenset(
        {RequestState.DISCONNECTED, RequestState.RESUMING, RequestState.RESUMED, RequestState.ENDED}
    ),
    RequestState.DISCONNECTED: frozenset(RequestState),
    RequestState.RESUMING: frozenset(RequestState) - {RequestState.RESUMING},
    RequestState.BUSY: frozenset(RequestState),
    RequestState.RESUMED: frozenset(RequestState) - {RequestState.RUNNING},
    RequestState.ENDED: frozenset(),
}
"""The states that may follow each state. Any other step is a bug of this client, whatever the server sends."""

_INTERRUPTED = frozenset({RequestState.DISCONNECTED, RequestState.RESUMING, RequestState.BUSY})


class ResumableRequest:
    """A request in flight: the message that began it, the answer so far, and the state between client and server."""

    def __init__(self, message: Message, retries: int = 0, answer: Answer | None = None) -> None:
        """``message`` is a checked generate message. It is sent again ``retries`` times if the server is overloaded.

        ``answer`` takes what arrives; it may hold the beginning of the answer already.
        """
        request_id = message["id"]
        assert isinstance(request_id, int)
        self.id = request_id
        self.message = message
        self.retries = retries
        self.answer = Answer(message) if answer is None else answer
        self.state = RequestState.RUNNING
        self.heard_s = time.monotonic()
        """When the server last said anything about this request."""
        self._may_begin_again = True
        self._losses = 0
        """How often it was lost before the server accepted it."""
        self.resume_at_s = math.inf
        """When to send `resume`: at once while DISCONNECTED, after a while if BUSY, else never."""
        self.notify: Callable[[], object] = lambda: None
        """Called after each message and at the end."""
        self.relay: Callable[[dict[object, object]], bool] | None = None
        """Takes each message before `take`, as it was decoded; returns False for one that `take` should have."""

    @property
    def has_ended(self) -> bool:
        return self.state is RequestState.ENDED

    @property
    def is_interrupted(self) -> bool:
        """True from the loss of a connection until the server has agreed to continue."""
        return self.state in _INTERRUPTED

    def described(self) -> str:
        """Return the state and the beginning of the answer in a few words."""
        text = self.answer.partial().text
        state = "failed" if self.answer.error is not None else "ended" if self.has_ended else "running"
        return f"{text if len(text) <= 60 else text[:57] + '...'!r}, {state}"

    def can_retry(self, message: Failed) -> bool:
        """Return True if the server refused the request for now, before anything of its answer has arrived."""
        is_new = self.state is RequestState.RUNNING and not any(self.answer.offsets())
        return message.code == "overloaded" and self.retries > 0 and is_new

    def forbid_new(self) -> None:
        """Fail rather than send the request again if the server does not know it."""
        self._may_begin_again = False

    def disconnect(self) -> None:
        """Note that the connection was lost."""
        self._enter(RequestState.DISCONNECTED, resume_at_s=0.0)

    def resume(self) -> Message:
        """Return the message that asks for what follows the tokens that have arrived."""
        self._enter(RequestState.RESUMING)
        return {"type": "resume", "id": self.id, "session": self.message["session"], "offsets": self.answer.offsets()}

    def fail(self, error: MgpuError) -> None:
        """End the request with an error."""
        self.answer.fail(error)
        self.close()

    def close(self) -> None:
        """End the request: no further message is expected. A second call does nothing."""
        if not self.has_ended:
            self._enter(RequestState.ENDED)
            self.notify()

    def take(self, message: ServerMessage) -> Message | None:
        """Handle a message about this request. Return the message to send in reply, or None."""
        if isinstance(message, Failed):
            return self._on_failed(message)
        if isinstance(message, Resumed):
            return self._on_resumed(message)
        if not self.is_interrupted:
            self.heard_s = time.monotonic()
            self._on_progress(message)
        return None

    def _on_progress(self, message: ServerMessage) -> None:
        if isinstance(message, Tokens):
            self.answer.add(message)
        elif isinstance(message, Accepted):
            self.answer.accepted = message
        elif isinstance(message, Finished):
            self._on_finished(message)
            return
        elif isinstance(message, Keepalive):
            self.answer.release()  # other choices go on: the piece held back for `Finished` need not wait for it
        self.notify()

    def _on_finished(self, message: Finished) -> None:
        if self.state is RequestState.RESUMED and "cancelled" in message.finish_reasons:
            self.fail(ServerUnreachable("the connection was lost, and the server ended the request"))
        else:
            self.answer.finish(message)
            self.close()

    def _on_resumed(self, message: Resumed) -> Message | None:
        """Go on if what follows fits the tokens that have arrived. Otherwise ask, unless an answer is awaited."""
        if message.offsets is None or message.offsets == self.answer.offsets():
            self._enter(RequestState.RESUMED)
            self.heard_s = time.monotonic()
            self.answer.release()
            self.notify()
            return None
        return None if self.is_interrupted else self.resume()

    def _on_failed(self, message: Failed) -> Message | None:
        if message.code == "unknown_request" and not any(self.answer.offsets()) and self._may_begin_again:
            return self._send_again() if self.is_interrupted else None  # else an earlier `resume` was answered late
        if message.code in ("overloaded", "not_ready") and self.state is not RequestState.RUNNING:
            self.heard_s = time.monotonic()
            self._enter(RequestState.BUSY, resume_at_s=self.heard_s + (message.retry_after_s or RETRY_S))
        else:
            self.fail(error_of(message))
        return None

    def _send_again(self) -> Message | None:
        """Return the message that began the request, which did not get as far as the engine; None if it has ended.

        The server may have died of it while it read it. So it is sent again once, unless it has been accepted.
        """
        if self.answer.accepted is None:
            self._losses += 1
            if self._losses > 1:
                self.fail(RequestFailed("engine_error", _LOST_TWICE))
                return None
        self._enter(RequestState.RUNNING)
        if self.answer.accepted is not None:  # the engine never heard of it, but the seed was promised
            self.message = {**self.message, "seed": self.answer.accepted.seed}
        return self.message

    def _enter(self, state: RequestState, resume_at_s: float = math.inf) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state.name} -> {state.name}"
        self.state, self.resume_at_s = state, resume_at_s


def error_of(message: Failed) -> MgpuError:
    """Return the error that the caller of a failed request or query gets."""
    if message.code == "deadline_exceeded":
        return DeadlineExceeded(message.message)
    if message.code == "stopped":
        return ServerStopped(message.code, message.message, message.retry_after_s)
    return RequestFailed(message.code, message.message, message.retry_after_s)
