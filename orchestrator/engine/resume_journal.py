"""The journal of requests that can be resumed: a new gateway goes on where the old one died.

A client names its requests by a secret session and an id. While a request lives, its tokens are the sequence's own.
After its end they are kept for a while, because the last message may not have reached the client.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.protocol.internal.gateway_messages import Outputs, Resumable, SequenceRecord, Submit
from mgpu.protocol.internal.packed_logprobs import LogprobPacking

KEEP_S = 60.0
KEEP_REQUESTS = 4096
KEEP_BYTES = 64 << 20
"""How long, and how many, requests are kept after their end; the oldest are dropped first."""
PORTION_TOKENS, PORTION_LOGPROB_BYTES = 4096, 64 << 10
"""Most that one `Journal.look_up` returns, so that it holds up neither the step loop nor the gateway."""

Key = tuple[str, int]


@dataclass(slots=True)
class _Room:
    """Room that is left in a portion."""

    tokens: int
    logprob_bytes: int


@dataclass(slots=True)
class _Entry:
    """One sequence of a request."""

    sequence_id: int
    stop_token_ids: list[int]
    num_top: int
    """Candidates whose log-probabilities the client wants beside each token's own; -1: none at all."""
    packing: LogprobPacking | None
    seq: Sequence | None = None
    """Holds the tokens while it runs."""
    token_ids: bytes = b""
    """Holds the tokens after its end."""
    logprobs: bytearray = field(default_factory=bytearray)
    finish: str = ""
    error: str = ""
    cached_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4 if self.seq is None else len(self.seq.tokens) - self.seq.prompt_len

    def end(self, finish: str, error: str) -> None:
        """Copy the tokens of a sequence that has ended."""
        self.token_ids = self._tokens(0, self.num_tokens)
        self.finish, self.error = finish, error
        self.cached_tokens, self.seq = self.seq.cached_tokens if self.seq else 0, None

    def portion(self, known: int, offset: int, room: _Room) -> SequenceRecord:
        """Return what follows the first ``known`` tokens, as far as there is room. See `RecordQuery`."""
        total = self.num_tokens
        start = total if known < 0 else min(known, total)
        first = total if offset < 0 else min(max(start, offset), total)
        end, logprobs = min(total, start + room.tokens), b""
        if self.packing is not None:
            width = self.packing.width
            end = min(end, first + room.logprob_bytes // width)
            logprobs = bytes(self.logprobs[first * width : end * width])
        room.tokens -= end - start
        room.logprob_bytes -= len(logprobs)
        return SequenceRecord(
            self.sequence_id,
            self.stop_token_ids,
            total,
            self._tokens(start, end),
            logprobs,
            self.num_top,
            self.finish,
            self.error,
            self.cached_tokens if self.seq is None else self.seq.cached_tokens,
        )

    def _tokens(self, start: int, end: int) -> bytes:
        if self.seq is None:
            return self.token_ids[4 * start : 4 * end]
        return self.seq.tokens[self.seq.prompt_len + start : self.seq.prompt_len + end].tobytes()


@dataclass(slots=True)
class _Request:
    key: Key
    context: bytes
    entries: list[_Entry]
    num_open: int
    is_claimed: bool = True
    ended_s: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Size after its end."""
        return len(self.context) + sum(len(entry.token_ids) + len(entry.logprobs) for entry in self.entries)


@dataclass(slots=True)
class Journal:
    """Requests by key and by sequence id. For one thread."""

    clock_s: Callable[[], float] = time.monotonic
    _requests: dict[Key, _Request] = field(default_factory=dict)
    _by_sequence: dict[int, tuple[_Request, _Entry]] = field(default_factory=dict)
    _with_logprobs: int = 0
    _ended: "OrderedDict[Key, _Request]" = field(default_factory=OrderedDict)
    _kept_bytes: int = 0

    def __len__(self) -> int:
        return len(self._requests)

    def knows(self, sequence_id: int) -> bool:
        """Return whether a running sequence can be resumed."""
        return sequence_id in self._by_sequence

    def open(self, message: Resumable) -> bool:
        """Begin a request. Return False when one of the same name runs: it must not be answered twice."""
        key = (message.session, message.request_id)
        old = self._requests.get(key)
        if old is not None:
            if old.num_open:
                return False
            self._forget(old)
        entries = [_entry(submit) for submit in message.submits]
        request = _Request(key, message.context, entries, len(entries))
        self._requests[key] = request
        for entry in entries:
            self._by_sequence[entry.sequence_id] = (request, entry)
            self._with_logprobs += entry.packing is not None
        return True

    def attach(self, sequence_id: int, seq: Sequence | None) -> None:
        """Say which sequence holds the tokens; None when it was refused."""
        self._by_sequence[sequence_id][1].seq = seq

    def note(self, outputs: Outputs) -> None:
        """Take in what goes to the gateway. Costs next to nothing for a step in which nothing ends."""
        if self._with_logprobs:
            for sequence_id, logprobs in zip(outputs.sequence_ids, outputs.logprobs, strict=True):
                found = self._by_sequence.get(sequence_id)
                if logprobs and found is not None and (packing := found[1].packing) is not None:
                    found[1].logprobs += packing.pack(logprobs)
        if any(outputs.finish):
            for sequence_id, finish, error in zip(outputs.sequence_ids, outputs.finish, outputs.errors, strict=True):
                if finish and (found := self._by_sequence.pop(sequence_id, None)):
                    self._end(*found, finish, error)

    def look_up(
        self, session: str, request_id: int, known: list[int] | None = None, offsets: list[int] | None = None
    ) -> tuple[bytes, list[SequenceRecord]]:
        """Return the gateway's own note of a request and a portion of its tokens; empty when it is unknown.

        The request counts as claimed from now on. ``known`` and ``offsets`` are those of `RecordQuery`.
        """
        request = self._requests.get((session, request_id))
        if request is None:
            return b"", []
        request.is_claimed = True
        room = _Room(PORTION_TOKENS, PORTION_LOGPROB_BYTES)
        records = [
            entry.portion(_number_at(known, index), _number_at(offsets, index), room)
            for index, entry in enumerate(request.entries)
        ]
        return request.context, records

    def lose_clients(self) -> None:
        """Note that every connection is gone. Clients that come back claim their requests by `look_up`."""
        for request in self._requests.values():
            request.is_claimed = False

    def unclaimed(self) -> list[int]:
        """Return the running sequences that no client has claimed."""
        return [number for number, (request, _) in self._by_sequence.items() if not request.is_claimed]

    def prune(self) -> None:
        """Drop requests that ended long ago, and the oldest if there are too many."""
        while self._ended:
            oldest = next(iter(self._ended.values()))
            too_much = len(self._ended) > KEEP_REQUESTS or self._kept_bytes > KEEP_BYTES
            if not too_much and self.clock_s() - oldest.ended_s < KEEP_S:
                return
            self._forget(oldest)

    def _end(self, request: _Request, entry: _Entry, finish: str, error: str) -> None:
        entry.end(finish, error)
        self._with_logprobs -= entry.packing is not None
        request.num_open -= 1
        if not request.num_open:
            request.ended_s = self.clock_s()
            self._ended[request.key] = request
            self._kept_bytes += request.num_bytes
            self.prune()

    def _forget(self, request: _Request) -> None:
        del self._requests[request.key]
        del self._ended[request.key]
        self._kept_bytes -= request.num_bytes


def _entry(submit: Submit) -> _Entry:
    num_top = submit.sampling.num_logprobs
    packing = LogprobPacking(num_top) if num_top >= 0 else None
    entry = _Entry(submit.sequence_id, submit.stop_token_ids, num_top, packing)
    if packing is not None:  # whoever sent the emitted tokens has their log-probabilities
        entry.logprobs = bytearray(packing.width * submit.num_emitted)
    return entry


def _number_at(numbers: list[int] | None, index: int) -> int:
    """Return a number of a list that may be too short: a client's own counts have not been checked."""
    return numbers[index] if numbers and index < len(numbers) else 0
