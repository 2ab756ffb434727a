"""Put an answer together: server messages in, pieces and in the end the whole completion out. No I/O."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mgpu.protocol.client.requests.parsed_text import ParsedText, parser_for
from mgpu.protocol.client.requests.results import Completion, CompletionChoice, Piece, TokenLogprob, Usage
from mgpu.protocol.errors import DeadlineExceeded, MgpuError
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.server_messages import Accepted, Finished, Tokens


@dataclass(slots=True)
class _Choice:
    """What has arrived of one choice."""

    text: ParsedText | None = None
    """None before the first token."""
    num_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    has_ended: bool = False
    finish_reason: str = "cancelled"
    stop_string: str | None = None


class Answer:
    """The answer to one request, as far as it has arrived."""

    def __init__(self, request: Mapping[str, object], *, is_passed_on: bool = False) -> None:
        """``request`` is a checked generate message.

        ``is_passed_on``: pieces that were taken are not kept, so there is no whole answer; those that were not are
        counted.
        """
        num_choices = request.get("n", 1)
        assert isinstance(num_choices, int)
        self.pieces: deque[Piece] = deque()
        """Pieces that the caller has not taken yet."""
        self.unread_bytes = 0
        """About how much memory they take, if the answer is passed on."""
        self.is_awaited = False
        """The caller waits for the next piece."""
        self.error: MgpuError | None = None
        """Why the request failed."""
        self.accepted: Accepted | None = None
        self._finished: Finished | None = None
        self._last: Piece | None = None
        """The last piece of a choice, held back: if `Finished` comes next, this piece brings the usage."""
        self._request = request
        self._wants_logprobs = request.get("logprobs") is not None
        self._is_passed_on = is_passed_on
        self._choices = [_Choice() for _ in range(num_choices)]

    def offsets(self) -> list[int]:
        """Return how many tokens of each choice have arrived, -1 if the choice has ended; as a `resume` says it."""
        return [-1 if choice.has_ended else choice.num_tokens for choice in self._choices]

    def add(self, message: Tokens) -> None:
        """Add the next tokens of a choice."""
        if not 0 <= message.index < len(self._choices):
            raise FieldError(f"the server sent choice {message.index} of {len(self._choices)}")
        self.release()
        logprobs = _logprobs(message) if self._wants_logprobs else None
        choice = self._choices[message.index]
        choice.num_tokens += len(message.token_ids)
        if not self._is_passed_on:
            choice.token_ids += message.token_ids
            choice.logprobs += logprobs or ()
        choice.stop_string = message.stop_string
        piece = self._piece(
            choice, message.index, message.text, message.finish_reason, tuple(message.token_ids), logprobs
        )
        if message.finish_reason is None:
            self._append(piece)
        else:
            self._last = piece

    def take(self, portion_bytes: int) -> list[Piece]:
        """Return the next pieces that were not taken: one at least, and about so many bytes at most."""
        if self.unread_bytes <= portion_bytes:
            pieces = list(self.pieces)
            self.pieces.clear()
            self.unread_bytes = 0
            return pieces
        pieces, left_bytes = [], portion_bytes
        while self.pieces and left_bytes > 0:
            pieces.append(self.pieces.popleft())
            num_bytes = _memory_bytes(pieces[-1])
            self.unread_bytes, left_bytes = self.unread_bytes - num_bytes, left_bytes - num_bytes
        return pieces

    def discard(self, error: MgpuError) -> None:
        """End the answer with an error, without the pieces that were not taken."""
        self.pieces.clear()
        self._last, self.unread_bytes, self.error = None, 0, error

    def _append(self, piece: Piece) -> None:
        if self.error is None:
            self.pieces.append(piece)
            self.unread_bytes += _memory_bytes(piece) if self._is_passed_on else 0

    def _piece(
        self,
        choice: _Choice,
        index: int,
        text: str,
        reason: str | None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
    ) -> Piece:
        """Return what a part of the text brings; with ``reason`` it is the last of its choice."""
        if choice.text is None:
            choice.text = ParsedText(parser_for(self._request, self.accepted), is_kept=not self._is_passed_on)
        part = choice.text.add(text, is_last=reason is not None)
        if reason is not None:
            reason = "tool_calls" if reason == "stop" and choice.text.has_calls else reason
            choice.has_ended, choice.finish_reason = True, reason
        calls, stop = part.tool_calls, choice.stop_string
        return Piece(index, part.text, token_ids, logprobs, reason, None, part.reasoning, calls, stop)

    def finish(self, message: Finished) -> None:
        """End the answer. A choice without a last piece was cancelled before its first token."""
        if len(message.finish_reasons) != len(self._choices):
            raise FieldError(f"the server ended {len(message.finish_reasons)} choices of {len(self._choices)}")
        for index, reason in enumerate(message.finish_reasons):
            choice = self._choices[index]
            if not choice.has_ended:
                self.release()
                self._last = self._piece(choice, index, "", reason, (), () if self._wants_logprobs else None)
        self.release(_usage(message))
        self._finished = message

    def fail(self, error: MgpuError) -> None:
        """End the answer with an error; pieces that came before can still be taken."""
        self.release()
        if isinstance(error, DeadlineExceeded):
            error.partial = self.partial()
        self.error = error

    def release(self, usage: Usage | None = None) -> None:
        """Hand out the piece that was held back, if there is one."""
        if self._last is not None:
            self._append(replace(self._last, usage=usage))
            self._last = None

    def completion(self) -> Completion:
        """Return the whole answer. If the request failed, raise its error; MgpuError if it has not ended."""
        if self.error is not None:
            raise self.error
        if self._is_passed_on:
            raise MgpuError("the answer was passed on, and not kept")
        if self._finished is None:
            raise MgpuError("the answer is not complete: its stream was closed, or has not ended yet")
        choices = self._completed()
        accepted = self.accepted or Accepted(self._finished.id, "", self._finished.prompt_tokens, 0, 0)
        return Completion(choices, _usage(self._finished), accepted.model, accepted.seed)

    def partial(self) -> Completion:
        """Return what has arrived. Choices that have not ended count as cancelled; the usage is what is known."""
        choices = self._completed()
        num_tokens = sum(choice.num_tokens for choice in self._choices)
        usage = Usage(self.accepted.prompt_tokens if self.accepted else 0, num_tokens, 0)
        model, seed = (self.accepted.model, self.accepted.seed) if self.accepted else ("", 0)
        return Completion(choices, usage, model, seed)

    def _completed(self) -> tuple[CompletionChoice, ...]:
        choices = []
        for index, choice in enumerate(self._choices):
            logprobs = tuple(choice.logprobs) if self._wants_logprobs else None
            text, reasoning, calls = ("", "", ()) if choice.text is None else choice.text.so_far(choice.has_ended)
            ids, reason = tuple(choice.token_ids), choice.finish_reason
            stop = choice.stop_string
            choices.append(CompletionChoice(index, text, ids, logprobs, reason, reasoning, calls, stop))
        return tuple(choices)


def _usage(message: Finished) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def _logprobs(message: Tokens) -> tuple[TokenLogprob, ...]:
    try:
        return tuple(
            TokenLogprob(token_id, entry["text"], entry["logprob"], tuple((a, b, c) for a, b, c in entry["top"]))
            for token_id, entry in zip(message.token_ids, message.logprobs or (), strict=False)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FieldError(f"malformed log-probabilities: {type(error).__name__}: {error}") from None


def _memory_bytes(piece: Piece) -> int:
    """Return about how much memory a piece takes: its objects, of which each has a head of some 50 bytes."""
    num_bytes = 250 + len(piece.text) + len(piece.reasoning) + 40 * len(piece.token_ids)
    for part in piece.tool_calls:
        num_bytes += 250 + len(part.name) + len(part.arguments)
    for logprob in piece.logprobs or ():
        num_bytes += 250 + 200 * len(logprob.top)
    return num_bytes
