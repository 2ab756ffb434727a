"""Replay what the engine has generated of one choice, portion by portion, and send only what the client lacks.

The detokenizer runs over all tokens again, so that characters and stop strings across the splice come out right.

    tokens of the choice    0 1 2 3 4 5 6 7      the client has 3 (offset), the engine's record brings two portions
    portion 1               [0 1 2 3 4]          0 1 2 are only detokenized; 3 4 are sent
    portion 2                         [5 6 7]    all are sent, and with the last one the finish reason
"""

from collections.abc import Iterator

from mgpu.orchestrator.gateway.requests.request import MAX_HELD_TOKENS, Choice, Request
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.server_messages import Tokens
from mgpu.protocol.internal.gateway_messages import SequenceRecord
from mgpu.protocol.internal.packed_logprobs import LogprobPacking


class Replay:
    """One choice and how far its replay is. Until it is complete, the engine's steps do not touch the choice."""

    def __init__(self, request: Request, choice: Choice, offset: int) -> None:
        """``offset`` is how many tokens the client has, -1 when it has all of them and the finish reason."""
        self.choice = choice
        self._request = request
        self._num_replayed = 0
        choice.offset, choice.is_replaying = offset, True

    @property
    def known(self) -> int:
        """How many tokens have come, -1 when no more are wanted; see `gateway_messages.RecordQuery`."""
        return -1 if self.choice.is_over else self._num_replayed

    def is_complete(self, record: SequenceRecord) -> bool:
        """Return whether all that the engine has generated is replayed, now that `take` has had ``record``."""
        return self.known in (-1, record.num_tokens)

    def take(self, record: SequenceRecord) -> Iterator[Tokens]:
        """Add a portion to the choice, and yield messages with what the client lacks."""
        choice, tokens = self.choice, int32_array(record.token_ids)
        logprobs = LogprobPacking(record.num_top).unpack(record.logprobs) if record.logprobs else []
        num_had = len(tokens) if choice.offset < 0 else max(0, choice.offset - self._num_replayed)
        had, lacked = tokens[:num_had], tokens[num_had:]
        self._num_replayed += len(tokens)
        is_last = self._num_replayed == record.num_tokens
        finish = record.finish if is_last else ""

        if had:
            choice.pass_over(had, "" if lacked else finish)  # log-probabilities that the client has are left out
        if choice.offset < 0:
            if is_last:
                choice.end_early(finish or "cancelled")
            return
        if choice.is_over:  # by a stop string; the client has its last token but not the finish reason
            yield choice.take_message(self._request.id)
        while not choice.is_over and (lacked or finish):
            part, lacked = lacked[:MAX_HELD_TOKENS], lacked[MAX_HELD_TOKENS:]
            choice.add_tokens(part, logprobs[:MAX_HELD_TOKENS], "" if lacked else finish)
            logprobs = logprobs[MAX_HELD_TOKENS:]
            if self._request.wants_message(choice):
                yield choice.take_message(self._request.id)
