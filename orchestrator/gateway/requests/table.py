"""Requests in flight: what each client asked for, and how far each of its choices is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgpu.orchestrator.gateway.requests.quota import Quota, owner_of
from mgpu.orchestrator.gateway.text.detokenizer import Detokenizer
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.front.server_messages import Finished, Tokens
from mgpu.protocol.internal.worker_messages import TokenLogprobs

MAX_HELD_TOKENS = 512
"""A request that is not streamed still sends this often, which bounds the size of a message."""
MAX_HELD_LOGPROBS = 32
"""And this often with log-probabilities, which bounds the gateway's memory: with 20 candidates a token takes 5 KB."""


@dataclass(slots=True)
class ChoiceState:
    """One of the ``n`` continuations. Collects what `drain` then puts into a message."""

    index: int
    sequence_id: int
    stop_token_ids: frozenset[int]
    codec: TextCodec | None
    text: Detokenizer | None
    """None when the model has no tokenizer: ids only."""
    is_behind: bool = False
    """What the engine says of it now will come again with the portions of its record; see replay.py."""
    offset: int = 0
    """How many of its first tokens the client has from another connection, -1 when it has all, the end included."""
    num_tokens: int = 0
    finish_reason: str | None = None
    held_text: str = ""
    held_ids: list[int] = field(default_factory=list)
    held_logprobs: list[dict[str, Any]] = field(default_factory=list)

    def absorb(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], finish: str) -> None:
        """Take the tokens of one step; ``finish`` is empty while the engine goes on. Ignores what follows a stop."""
        for at, token_id in enumerate(token_ids):
            self.held_ids.append(token_id)
            self.num_tokens += 1
            if logprobs:
                self.held_logprobs.append(self._logprob(token_id, logprobs[at]))
            ends = finish == "stop" and at == len(token_ids) - 1 and token_id in self.stop_token_ids
            if self._show(token_id, ends):
                return
        if finish:
            self._end(finish)

    def _show(self, token_id: int, ends: bool) -> bool:
        """Add a token's text unless it is the stop token itself; True when a stop string ends the choice."""
        if self.text is None or ends:
            return False
        self.held_text += self.text.push(token_id)
        if self.text.stopped:
            self.finish_reason = "stop"
        return self.text.stopped

    def _end(self, finish: str) -> None:
        if self.text is not None:
            self.held_text += self.text.flush()
            finish = "stop" if self.text.stopped else finish
        self.finish_reason = finish

    def end_early(self, reason: str) -> None:
        """End the choice for another reason than the engine's."""
        if self.finish_reason is None:
            self._end(reason)
            if self.offset < 0 or self.num_tokens < self.offset:
                self.forget_held()

    def _logprob(self, token_id: int, values: TokenLogprobs) -> dict[str, Any]:
        top = [
            [other, logprob, self._token_text(other)]
            for other, logprob in zip(values.top_ids, values.top_logprobs, strict=True)
        ]
        return {"logprob": values.chosen, "text": self._token_text(token_id), "top": top}

    def _token_text(self, token_id: int) -> str:
        return "" if self.codec is None else self.codec.text_of(token_id)

    def forget_held(self) -> None:
        """Drop what was collected: the client has it."""
        self.held_text, self.held_ids, self.held_logprobs = "", [], []

    def drain(self, request_id: int) -> Tokens:
        """Give what was collected since the last call."""
        logprobs = self.held_logprobs or None
        message = Tokens(request_id, self.index, self.held_text, self.held_ids, logprobs, self.finish_reason)
        self.forget_held()
        return message


@dataclass(slots=True)
class Request:
    """One generate request from arrival to its terminal message."""

    client: bytes
    spec: Generate
    last_sent_s: float
    deadline_s: float | None
    identity: str = ""
    """Whose it is, beyond the connection; see `front.Received`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    choices: list[ChoiceState] = field(default_factory=list)
    """Empty until the prompt is tokenized."""
    size: int = 0
    """What it weighs while it waits; see `quota.size_of`."""
    is_encoding: bool = False
    """A thread has its prompt, or will."""
    is_over: bool = False

    @property
    def owner(self) -> str:
        """Whose limits and share it counts to."""
        return owner_of(self.identity, self.client)

    @property
    def id(self) -> int:
        return self.spec.id

    @property
    def done(self) -> bool:
        return bool(self.choices) and all(choice.finish_reason is not None for choice in self.choices)

    def wants_message(self, choice: ChoiceState) -> bool:
        """Tell whether what ``choice`` holds should be sent now."""
        if choice.finish_reason is not None or len(choice.held_ids) >= MAX_HELD_TOKENS:
            return True
        if len(choice.held_logprobs) >= MAX_HELD_LOGPROBS:
            return True
        return self.spec.stream and bool(choice.held_ids or choice.held_text)

    def cancel(self) -> Iterator[Tokens]:
        """End every choice that goes on, and give the last messages: none of a choice whose end the client has."""
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.end_early("cancelled")
                if choice.offset >= 0:
                    yield choice.drain(self.id)

    def finished(self) -> Finished:
        reasons = [choice.finish_reason or "cancelled" for choice in self.choices] or ["cancelled"] * self.spec.n
        total = sum(choice.num_tokens for choice in self.choices)
        return Finished(self.id, reasons, self.prompt_tokens, total, self.cached_tokens)


class RequestTable:
    """All requests, found by client and id, and by the sequence ids that the engine knows; keeps the quota's books."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self._by_client: dict[bytes, dict[int, Request]] = {}
        self._by_sequence: dict[int, tuple[Request, ChoiceState]] = {}
        self._by_session: dict[tuple[str, int], Request] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        """Iterate over a copy, so that requests may end meanwhile."""
        return iter([request for requests in self._by_client.values() for request in requests.values()])

    def get(self, client: bytes, request_id: int) -> Request | None:
        return self._by_client.get(client, {}).get(request_id)

    def of_client(self, client: bytes) -> list[Request]:
        return list(self._by_client.get(client, {}).values())

    def by_sequence(self, sequence_id: int) -> tuple[Request, ChoiceState] | None:
        """Find a choice that is still going on; None when its request has ended."""
        return self._by_sequence.get(sequence_id)

    def by_session(self, session: str | None, request_id: int) -> Request | None:
        """Find a request by its client's own names, whatever connection it came on."""
        return None if session is None else self._by_session.get((session, request_id))

    def add(self, request: Request) -> None:
        request.is_over = False
        self._by_client.setdefault(request.client, {})[request.id] = request
        if request.spec.session is not None:
            self._by_session[request.spec.session, request.id] = request
        self._count += 1
        self.quota.arrive(request.owner, request.size, request.spec.n)

    def start(self, request: Request, choices: list[ChoiceState]) -> None:
        """Note that the engine has been given the sequences of ``request``."""
        request.choices = choices
        self.quota.submit(request.owner, [choice.sequence_id for choice in choices], request.size)
        for choice in choices:
            self._by_sequence[choice.sequence_id] = (request, choice)

    def end_choice(self, choice: ChoiceState) -> None:
        """Forget a choice, unless another request has taken its sequence over."""
        found = self._by_sequence.get(choice.sequence_id)
        if found is not None and found[1] is choice:
            del self._by_sequence[choice.sequence_id]

    def remove(self, request: Request) -> None:
        """Forget a request that has ended."""
        requests = self._by_client[request.client]
        del requests[request.id]
        if not requests:
            del self._by_client[request.client]
        if self.by_session(request.spec.session, request.id) is request:
            del self._by_session[request.spec.session or "", request.id]
        self._count -= 1
        request.is_over = True
        if not request.choices and not request.is_encoding:
            self.forget_prompt(request)
        self.quota.leave(request.owner, [each.sequence_id for each in request.choices if self._is_own(request, each)])
        for choice in request.choices:
            self.end_choice(choice)

    def _is_own(self, request: Request, choice: ChoiceState) -> bool:
        """Tell whether no other request has taken a sequence over."""
        found = self._by_sequence.get(choice.sequence_id)
        return found is None or found[0] is request

    def move(self, request: Request, client: bytes) -> None:
        """Let a request whose prompt is being tokenized go on on another connection."""
        self.remove(request)
        self.forget_prompt(request)
        request.client = client
        self.add(request)

    def forget_prompt(self, request: Request) -> None:
        """Give back what a request weighs that was never submitted; a thread may have had its prompt until now."""
        self.quota.withdraw(request.owner, request.size, request.spec.n)
