"""Bring a request that another gateway, or another connection, began to where the engine is, portion by portion."""

from collections.abc import Iterator, Sequence

from mgpu.orchestrator.gateway.requests.table import MAX_HELD_TOKENS, ChoiceState, Request
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.server_messages import Tokens
from mgpu.protocol.internal.gateway_messages import SequenceRecord
from mgpu.protocol.internal.packed_logprobs import LogprobPacking
from mgpu.protocol.internal.worker_messages import TokenLogprobs


class Replay:
    """The tokens of one choice again: first what the client has, then the rest."""

    def __init__(self, choice: ChoiceState, offset: int) -> None:
        """``offset`` is how many tokens the client has, -1 when it has all that it wants."""
        self.choice = choice
        self._at = 0
        choice.offset, choice.is_behind = offset, True

    @property
    def is_over(self) -> bool:
        """Whether the choice has ended."""
        return self.choice.finish_reason is not None

    @property
    def known(self) -> int:
        """How many tokens have come, -1 when no more are wanted; see `link.Resume`."""
        return -1 if self.is_over else self._at

    def take(self, record: SequenceRecord, request: Request) -> Iterator[Tokens]:
        """Absorb a portion, in parts that fit a message, and give the messages that the client does not have."""
        choice, tokens, logprobs = self.choice, int32_array(record.token_ids), _logprobs_of(record)
        offset, start, end = choice.offset, self._at, self._at + len(tokens)
        is_whole = end == record.num_tokens
        with_logprobs = end - len(logprobs)
        while not self.is_over and (self._at < end or (is_whole and record.finish)):
            # No part goes across the offset: the client has what is before it, so that comes without log-probabilities.
            at, is_heard = self._at, offset < 0 or self._at < offset
            self._at = min(end, at + MAX_HELD_TOKENS, offset if 0 <= at < offset else end)
            part = logprobs[at - with_logprobs : self._at - with_logprobs] if at >= with_logprobs else ()
            ends = is_whole and self._at == end and (offset < 0 or at >= offset)
            choice.absorb(tokens[at - start : self._at - start], part, record.finish if ends else "")
            if is_heard:
                choice.forget_held()
            if offset >= 0 and request.wants_message(choice):
                yield choice.drain(request.id)
        if offset < 0 and is_whole:
            choice.end_early("cancelled")


class CatchUp:
    """A request on its way to where the engine is. Until it is there, `Outputs` about it are void."""

    def __init__(self, request: Request, offsets: Sequence[int]) -> None:
        self.request = request
        self.replays = [Replay(choice, offset) for choice, offset in zip(request.choices, offsets, strict=True)]

    @property
    def known(self) -> tuple[int, ...]:
        return tuple(replay.known for replay in self.replays)

    def is_level(self, records: Sequence[SequenceRecord]) -> bool:
        """Tell whether all that the engine has said is absorbed, once `Replay.take` has been given ``records``."""
        return all(known in (-1, each.num_tokens) for known, each in zip(self.known, records, strict=True))

    def end(self) -> None:
        """Let the engine's next word continue the choices."""
        for replay in self.replays:
            replay.choice.is_behind = False


def _logprobs_of(record: SequenceRecord) -> list[TokenLogprobs]:
    return LogprobPacking(record.num_top).unpack(record.logprobs) if record.logprobs else []
