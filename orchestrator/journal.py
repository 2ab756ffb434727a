"""Remember what was said about every request that can be resumed, so that a new gateway can go on where one died.

A client names its requests by a secret session and an id. While a request lives, its tokens are the sequence's own;
after its end they are kept for a while, because nobody knows whether the last message reached the client.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from mgpu.orchestrator.sequence import Sequence
from mgpu.protocol.link import Outputs, Resumable, SequenceRecord, Submit

KEEP_S = 60.0
KEEP_REQUESTS = 4096
KEEP_TOKENS = 4_000_000
"""How long, and how many, requests are kept after their end; the oldest go first."""

Key = tuple[str, int]


@dataclass(slots=True)
class _Entry:
    """One sequence of a request."""

    record: SequenceRecord
    wants_logprobs: bool
    seq: Sequence | None = None
    """While it runs: where its tokens are."""

    def current(self) -> SequenceRecord:
        if self.seq is not None:
            self.record.token_ids = self.seq.tokens[self.seq.prompt_len :].tobytes()
            self.record.cached_tokens = self.seq.cached_tokens
        return self.record


@dataclass(slots=True)
class _Request:
    key: Key
    context: bytes
    entries: list[_Entry]
    num_open: int
    is_claimed: bool = True
    ended_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.record.token_ids) // 4 for entry in self.entries)


@dataclass(slots=True)
class Journal:
    """Requests by key and by the numbers of their sequences. One thread."""

    clock_s: Callable[[], float] = time.monotonic
    _requests: dict[Key, _Request] = field(default_factory=dict)
    _by_sequence: dict[int, tuple[_Request, _Entry]] = field(default_factory=dict)
    _with_logprobs: int = 0
    _ended: "OrderedDict[Key, _Request]" = field(default_factory=OrderedDict)
    _kept_tokens: int = 0

    def __len__(self) -> int:
        return len(self._requests)

    def knows(self, sequence_id: int) -> bool:
        """Tell whether a running sequence can be resumed."""
        return sequence_id in self._by_sequence

    def open(self, message: Resumable) -> bool:
        """Begin a request. False when one of the same name is running: it must not be answered twice."""
        key = (message.session, message.request_id)
        old = self._requests.get(key)
        if old is not None:
            if old.num_open:
                return False
            self._forget(old)
        entries = [_Entry(_empty_record(submit), submit.sampling.num_logprobs >= 0) for submit in message.submits]
        request = _Request(key, message.context, entries, len(entries))
        self._requests[key] = request
        for entry in entries:
            self._by_sequence[entry.record.request_id] = (request, entry)
            self._with_logprobs += entry.wants_logprobs
        return True

    def attach(self, sequence_id: int, seq: Sequence | None) -> None:
        """Tell where the tokens of a sequence are; None when it was refused."""
        self._by_sequence[sequence_id][1].seq = seq

    def note(self, outputs: Outputs) -> None:
        """Take in what the gateway is told. Costs next to nothing for a step in which nothing ends."""
        if self._with_logprobs:
            for sequence_id, logprobs in zip(outputs.request_ids, outputs.logprobs, strict=True):
                if logprobs and (found := self._by_sequence.get(sequence_id)):
                    found[1].record.logprobs.extend(logprobs)
        if any(outputs.finish):
            for sequence_id, finish, error in zip(outputs.request_ids, outputs.finish, outputs.errors, strict=True):
                if finish and (found := self._by_sequence.pop(sequence_id, None)):
                    self._end(*found, finish, error)

    def look_up(self, session: str, request_id: int) -> tuple[bytes, list[SequenceRecord]]:
        """Give the gateway's own note of a request, and all that was generated; nothing when it is not known.

        The request counts as claimed from now on.
        """
        request = self._requests.get((session, request_id))
        if request is None:
            return b"", []
        request.is_claimed = True
        return request.context, [entry.current() for entry in request.entries]

    def lose_clients(self) -> None:
        """Note that every connection is gone; who comes back claims its requests by `look_up`."""
        for request in self._requests.values():
            request.is_claimed = False

    def unclaimed(self) -> list[int]:
        """Give the running sequences that nobody has come back for."""
        return [number for number, (request, _) in self._by_sequence.items() if not request.is_claimed]

    def prune(self) -> None:
        """Drop what ended long ago, or too much of it."""
        while self._ended:
            oldest = next(iter(self._ended.values()))
            too_much = len(self._ended) > KEEP_REQUESTS or self._kept_tokens > KEEP_TOKENS
            if not too_much and self.clock_s() - oldest.ended_s < KEEP_S:
                return
            self._forget(oldest)

    def _end(self, request: _Request, entry: _Entry, finish: str, error: str) -> None:
        record = entry.current()
        record.finish, record.error = finish, error
        self._with_logprobs -= entry.wants_logprobs
        entry.seq = None
        request.num_open -= 1
        if not request.num_open:
            request.ended_s = self.clock_s()
            self._ended[request.key] = request
            self._kept_tokens += request.num_tokens
            self.prune()

    def _forget(self, request: _Request) -> None:
        del self._requests[request.key]
        del self._ended[request.key]
        self._kept_tokens -= request.num_tokens


def _empty_record(submit: Submit) -> SequenceRecord:
    return SequenceRecord(submit.request_id, submit.stop_token_ids, b"", [], "", "", 0)
