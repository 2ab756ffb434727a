"""Put an answer together: server messages in, pieces and in the end the whole completion out. No I/O."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mgpu.protocol.client.parsed_text import ParsedText, parser_for
from mgpu.protocol.client.results import Completion, CompletionChoice, Piece, TokenLogprob, Usage
from mgpu.protocol.errors import DeadlineExceeded, MgpuError
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.server_messages import Accepted, Finished, Tokens


@dataclass(slots=True)
class _Choice:
    """What has arrived of one choice."""

    text: ParsedText | None = None
    """None before the first token."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    has_ended: bool = False
    finish_reason: str = "cancelled"
    stop_string: str | None = None


class Answer:
    """The answer to one request, as far as it has arrived."""

    def __init__(self, request: Mapping[str, object]) -> None:
        """``request`` is a checked generate message."""
        num_choices = request.get("n", 1)
        assert isinstance(num_choices, int)
        self.pieces: deque[Piece] = deque()
        """Pieces that the caller has not taken yet."""
        self.error: MgpuError | None = None
        """Why the request failed."""
        self.accepted: Accepted | None = None
        self._finished: Finished | None = None
        self._last: Piece | None = None
        """The last piece of a choice, held back: if `Finished` comes next, this piece brings the usage."""
        self._request = request
        self._wants_logprobs = request.get("logprobs") is not None
        self._choices = [_Choice() for _ in range(num_choices)]

    def offsets(self) -> list[int]:
        """Return how many tokens of each choice have arrived, -1 if the choice has ended; as a `resume` says it."""
        return [-1 if choice.has_ended else len(choice.token_ids) for choice in self._choices]

    def add(self, message: Tokens) -> None:
        """Add the next tokens of a choice."""
        if not 0 <= message.index < len(self._choices):
            raise FieldError(f"the server sent choice {message.index} of {len(self._choices)}")
        self.release()
        logprobs = _logprobs(message) if self._wants_logprobs else None
        choice = self._choices[message.index]
        choice.token_ids += message.token_ids
        choice.logprobs += logprobs or ()
        choice.stop_string = message.stop_string
        piece = self._piece(
            choice, message.index, message.text, message.finish_reason, tuple(message.token_ids), logprobs
        )
        if message.finish_reason is None:
            self.pieces.append(piece)
        else:
            self._last = piece

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
            choice.text = ParsedText(parser_for(self._request, self.accepted))
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
            self.pieces.append(replace(self._last, usage=usage))
            self._last = None

    def completion(self) -> Completion:
        """Return the whole answer. If the request failed, raise its error; MgpuError if it has not ended."""
        if self.error is not None:
            raise self.error
        if self._finished is None:
            raise MgpuError("the answer is not complete: its stream was closed, or has not ended yet")
        choices = self._completed()
        accepted = self.accepted or Accepted(self._finished.id, "", self._finished.prompt_tokens, 0, 0)
        return Completion(choices, _usage(self._finished), accepted.model, accepted.seed)

    def partial(self) -> Completion:
        """Return what has arrived. Choices that have not ended count as cancelled; the usage is what is known."""
        choices = self._completed()
        usage = Usage(self.accepted.prompt_tokens if self.accepted else 0, sum(len(c.token_ids) for c in choices), 0)
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
