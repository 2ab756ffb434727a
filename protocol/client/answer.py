"""Put an answer together from the server's messages: the bookkeeping that both clients share. No I/O."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mgpu.protocol.client.results import Completion, CompletionChoice, Piece, TokenLogprob, Usage
from mgpu.protocol.errors import DeadlineExceeded, MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.server_messages import Accepted, Failed, Finished, ServerMessage, Tokens


@dataclass(slots=True)
class _Parts:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Answer:
    """One request as its client sees it: takes messages, gives pieces and in the end the completion. No I/O."""

    def __init__(self, request_id: int, num_choices: int, wants_logprobs: bool) -> None:
        self.id = request_id
        self.pieces: deque[Piece] = deque()
        """Pieces that are not yet taken."""
        self.done = False
        """A terminal message has come."""
        self.error: MgpuError | None = None
        self.accepted: Accepted | None = None
        self.request: Mapping[str, object] = {}
        """The generate message, to be sent again if it never arrived."""
        self.is_adrift = False
        """Its connection was lost, and the server has not taken it up again."""
        self.was_resumed = False
        self.heard_s = time.monotonic()
        """When the server last said anything about this request."""
        self.notify: Callable[[], None] = _nothing
        """Called after every message and failure."""
        self._finished: Finished | None = None
        self._held: Piece | None = None
        self._wants_logprobs = wants_logprobs
        self._parts = [_Parts() for _ in range(num_choices)]
        self._ended: set[int] = set()

    def take(self, message: ServerMessage) -> None:
        """Note a message of this request."""
        self.heard_s = time.monotonic()
        if isinstance(message, Tokens):
            self._release(None)
            self._hold(message)
        elif isinstance(message, Finished):
            self._finish(message)
        elif isinstance(message, Failed):
            self.fail(error_of(message))
        elif isinstance(message, Accepted):
            self.accepted = message
        else:
            self._release(None)
        self.notify()

    def fail(self, error: MgpuError) -> None:
        """End the request with an error; pieces that came before can still be taken."""
        self._release(None)
        self.error, self.done = error, True
        self.notify()

    def offsets(self) -> list[int]:
        """Give what has arrived of each choice, as a `resume` message says it."""
        return [-1 if index in self._ended else len(parts.token_ids) for index, parts in enumerate(self._parts)]

    def _hold(self, message: Tokens) -> None:
        """Keep the last piece of a choice until the next message: if that is the terminal one, it brings the usage."""
        if not 0 <= message.index < len(self._parts):
            raise FieldError(f"the server sent choice {message.index} of {len(self._parts)}")
        logprobs = _logprobs(message) if self._wants_logprobs else None
        parts = self._parts[message.index]
        parts.text.append(message.text)
        parts.token_ids += message.token_ids
        parts.logprobs += logprobs or ()
        piece = Piece(message.index, message.text, tuple(message.token_ids), logprobs, message.finish_reason, None)
        if message.finish_reason is None:
            self.pieces.append(piece)
        else:
            self._ended.add(message.index)
            self._held = piece

    def _release(self, usage: Usage | None) -> None:
        piece, self._held = self._held, None
        if piece is not None:
            self.pieces.append(replace(piece, usage=usage))

    def _finish(self, message: Finished) -> None:
        if self.was_resumed and "cancelled" in message.finish_reasons:
            self.fail(ServerUnreachable("the connection was lost for so long that the server gave the request up"))
            return
        for index, reason in enumerate(message.finish_reasons):
            if index not in self._ended:  # cancelled before its first token
                self._release(None)
                self._held = Piece(index, "", (), () if self._wants_logprobs else None, reason, None)
        self._release(_usage(message))
        self._finished, self.done = message, True

    def completion(self) -> Completion:
        """Put the whole answer together. MgpuError, the one that ended it, when there is none."""
        if self.error is not None:
            raise self.error
        if self._finished is None:
            raise MgpuError("the answer is not complete: its stream was closed, or has not ended yet")
        reasons = self._finished.finish_reasons
        choices = [self._choice(index, reasons[index]) for index in range(len(self._parts))]
        accepted = self.accepted or Accepted(self.id, "", self._finished.prompt_tokens, 0, 0)
        return Completion(tuple(choices), _usage(self._finished), accepted.model, accepted.seed)

    def _choice(self, index: int, reason: str) -> CompletionChoice:
        parts = self._parts[index]
        logprobs = tuple(parts.logprobs) if self._wants_logprobs else None
        return CompletionChoice(index, "".join(parts.text), tuple(parts.token_ids), logprobs, reason)


def _nothing() -> None:
    """Be the listener of an answer that nobody waits for."""


def _usage(message: Finished) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def error_of(message: Failed) -> MgpuError:
    """Give what the caller of a request gets to see of its failure."""
    if message.code == "deadline_exceeded":
        return DeadlineExceeded(message.message)
    return RequestFailed(message.code, message.message, message.retry_after_s)


def _logprobs(message: Tokens) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token_id, entry["text"], entry["logprob"], tuple((a, b, c) for a, b, c in entry["top"]))
        for token_id, entry in zip(message.token_ids, message.logprobs or (), strict=False)
    )


def answer_to(values: Mapping[str, object]) -> Answer:
    """Prepare for the answer to a checked generate message."""
    request_id, num_choices = values["id"], values.get("n", 1)
    assert isinstance(request_id, int)
    assert isinstance(num_choices, int)
    return Answer(request_id, num_choices, values.get("logprobs") is not None)
