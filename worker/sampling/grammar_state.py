"""Follow one row's answer through its grammar: which tokens may come next, as one bit per token."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_MASK_S = 1.0
"""CPU time for the tokens of one position. Ordinary grammars take some 50 µs."""


class GrammarState:
    """How far one answer has come. Not for several threads at once.

    A grammar that cannot go on has a ``failure``. Then only stop tokens are allowed, until the orchestrator ends the
    row. One whose masks take too long has a ``failure`` too, but goes on by its grammar until then: ranks differ in
    speed, only one of them reports failures, and all must choose the same token.
    """

    def __init__(self, matcher: "LLMatcher", stop_ids: list[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self._has_ended = False
        self._cannot_go_on = False
        self.failure = ""
        self._note_error()

    def take(self, token_ids: list[int]) -> None:
        """Go on by tokens of the answer. Those after a stop token have no meaning."""
        for token_id in token_ids:
            self._has_ended = self._has_ended or token_id in self._stop_ids
            if self._has_ended or self._cannot_go_on:
                return
            self._matcher.consume_token(token_id)
            self._note_error()

    def mask(self) -> bytes:
        """Return the tokens that may come next, little-endian: token 9 is bit 1 of byte 1."""
        began_s = time.thread_time()
        allowed = self._allowed()
        if not self.failure and (took_s := time.thread_time() - began_s) > MAX_MASK_S:
            self.failure = f"the grammar takes {took_s:.1f} s for one token, the limit is {MAX_MASK_S:g} s"
        return allowed.to_bytes(-(-self._vocab_size // 8), "little")

    def _allowed(self) -> int:
        stops = sum(1 << token_id for token_id in set(self._stop_ids))
        if self._has_ended or self._cannot_go_on or self._matcher.is_stopped():
            return stops
        bits = int.from_bytes(self._matcher.compute_bitmask(), "little") & ((1 << self._vocab_size) - 1)
        if self._note_error():
            return stops
        # A stop token may have text that the grammar means too. It ends the answer all the same.
        allowed = bits | stops if self._matcher.is_accepting() else bits & ~stops
        if not allowed:
            self._fail("no token of this model continues the text")
        return allowed or stops

    def _note_error(self) -> bool:
        if self._matcher.is_error() and not self._cannot_go_on:
            self._fail(self._matcher.get_error().splitlines()[0][:300])
        return self._cannot_go_on

    def _fail(self, why: str) -> None:
        self._cannot_go_on = True
        self.failure = self.failure or f"the grammar cannot go on: {why}"
