"""One generate request: what its client asked for, and how far each of its choices is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgpu.orchestrator.gateway.front.account import Account, account_of
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.text.detokenizer import Detokenizer
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.client_messages import Generate, TextQuery
from mgpu.protocol.front.server_messages import Finished, Tokens
from mgpu.protocol.internal.worker_messages import TokenLogprobs

MAX_HELD_TOKENS = 512
"""A request that is not streamed still sends this often, which bounds the size of a message."""
MAX_HELD_LOGPROBS = 32
"""And this often with log-probabilities, which bounds the gateway's memory: with 20 candidates a token takes 5 KB."""


@dataclass(slots=True)
class Choice:
    """One of the ``n`` continuations. Tokens are held until `take_message` puts them into a message."""

    index: int
    sequence_id: int
    stop_token_ids: frozenset[int]
    codec: TextCodec | None
    text: Detokenizer | None
    """None when the model has no tokenizer: ids only."""
    is_replaying: bool = False
    """The engine's steps are ignored for now: portions of its record bring their tokens (see replay.py)."""
    offset: int = 0
    """How many of its first tokens the client has from another connection; -1 if it has all and the finish reason."""
    num_tokens: int = 0
    last_token_s: float | None = None
    """When its last token came; None before the first."""
    finish_reason: str | None = None
    held_text: str = ""
    held_ids: list[int] = field(default_factory=list)
    held_logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None

    def add_tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], finish: str) -> None:
        """Add the tokens of one step; ``finish`` is empty while the engine goes on. Ignores what follows a stop."""
        self._push(token_ids, logprobs, finish)
        if finish and not self.is_over:
            self._end(finish)

    def pass_over(self, token_ids: Sequence[int], finish: str = "") -> None:
        """Take tokens that the client has, for the text of those that follow. ``finish`` is that of the last one."""
        self._push(token_ids, (), finish)
        self.discard_held()

    def _push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], finish: str) -> None:
        for at, token_id in enumerate(token_ids):
            self.held_ids.append(token_id)
            self.num_tokens += 1
            if logprobs:
                self.held_logprobs.append(self._logprob(token_id, logprobs[at]))
            is_stop_token = finish == "stop" and at == len(token_ids) - 1 and token_id in self.stop_token_ids
            if self.text is not None and not is_stop_token:  # the text of a stop token is not shown
                self.held_text += self.text.push(token_id)
                if self.text.stopped:
                    self.finish_reason = "stop"
                    return

    def begin_after(self, token_ids: Sequence[int]) -> None:
        """Begin with tokens that another server has sent. Refusal if they cannot be all of an unfinished answer."""
        self.pass_over(token_ids)
        if self.is_over:
            raise Refusal("bad_request", "emitted_ids hold a stop string: all is said")

    def _end(self, finish: str) -> None:
        if self.text is not None:
            self.held_text += self.text.flush()
            finish = "stop" if self.text.stopped else finish
        self.finish_reason = finish

    def end_early(self, reason: str) -> None:
        """End the choice, unless it has ended, for another reason than the engine's."""
        if not self.is_over:
            self._end(reason)
            if self.offset < 0 or self.num_tokens < self.offset:
                self.discard_held()

    def _logprob(self, token_id: int, values: TokenLogprobs) -> dict[str, Any]:
        top = [
            [other, logprob, self._token_text(other)]
            for other, logprob in zip(values.top_ids, values.top_logprobs, strict=True)
        ]
        return {"logprob": values.chosen, "text": self._token_text(token_id), "top": top}

    def _token_text(self, token_id: int) -> str:
        return "" if self.codec is None else self.codec.text_of(token_id)

    def discard_held(self) -> None:
        """Drop the held tokens and text: the client has them already."""
        self.held_text, self.held_ids, self.held_logprobs = "", [], []

    def take_message(self, request_id: int) -> Tokens:
        """Return what is held as a message, and hold it no longer."""
        logprobs = self.held_logprobs or None
        stop = self.text.stop_string if self.is_over and self.text is not None else None
        message = Tokens(request_id, self.index, self.held_text, self.held_ids, logprobs, self.finish_reason, stop)
        self.discard_held()
        return message


@dataclass(slots=True)
class Request:
    """One generate request from arrival to its last message."""

    connection: bytes
    spec: Generate
    last_sent_s: float
    deadline_s: float | None
    identity: str = ""
    owner: str = ""
    client: str = ""
    """These three say whose request it is; see front/account.py."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    choices: list[Choice] = field(default_factory=list)
    """Empty until the prompt is tokenized."""
    size: int = 0
    """Bytes that it counts for while it waits; see `quota.size_of`."""
    is_encoding: bool = False
    """A thread tokenizes its prompt, or will."""
    is_over: bool = False
    """It has left the table."""
    began_s: float | None = None
    """When it arrived; None if another gateway took it."""
    first_token_s: float | None = None
    queue_s: float | None = None
    """How long its first choice to run has waited in the engine; None while all wait."""
    query: TextQuery | None = None
    """Set if only its text matters: the engine does not hear of it."""

    @property
    def account(self) -> Account:
        return account_of(self.identity, self.connection, self.owner, self.client)

    @property
    def id(self) -> int:
        return self.spec.id

    @property
    def is_done(self) -> bool:
        """True if every choice has ended."""
        return bool(self.choices) and all(choice.is_over for choice in self.choices)

    def wants_message(self, choice: Choice) -> bool:
        """Return whether what ``choice`` holds should be sent now."""
        if choice.is_over or len(choice.held_ids) >= MAX_HELD_TOKENS:
            return True
        if len(choice.held_logprobs) >= MAX_HELD_LOGPROBS:
            return True
        return self.spec.stream and bool(choice.held_ids or choice.held_text)

    def cancel(self) -> Iterator[Tokens]:
        """End every choice that goes on, and yield its last message unless the client has its finish reason."""
        for choice in self.choices:
            if not choice.is_over:
                choice.end_early("cancelled")
                if choice.offset >= 0:
                    yield choice.take_message(self.id)

    def finished(self) -> Finished:
        reasons = [choice.finish_reason or "cancelled" for choice in self.choices] or ["cancelled"] * self.spec.n
        total = sum(choice.num_tokens for choice in self.choices)
        return Finished(self.id, reasons, self.prompt_tokens, total, self.cached_tokens)
