"""Follow one row's answer through its grammar: how far it has come, and which stop tokens may end it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

WORD_BITS = 32


class GrammarState:
    """How far one answer has come. Not for several threads at once.

    A grammar that cannot go on has a ``failure``. Then only stop tokens are allowed, until the orchestrator ends the
    row. One whose masks take too long has a ``failure`` too, but goes on by its grammar until then: ranks differ in
    speed, only one of them reports failures, and all must choose the same token.
    """

    def __init__(self, matcher: "LLMatcher", stop_ids: list[int], vocab_size: int) -> None:
        self.matcher = matcher
        self.failure = ""
        self.is_suspect = True
        """Whether the next mask is timed by itself."""
        self._stop_ids = frozenset(stop_ids)
        self._vocab_size = vocab_size
        self._has_ended = False
        self._cannot_go_on = False
        self.note_error()

    @property
    def is_open(self) -> bool:
        """Whether the matcher says what may come next."""
        return not (self._has_ended or self._cannot_go_on or self.matcher.is_stopped())

    def goes_on_by(self, token_id: int) -> bool:
        """Return whether the matcher is to take a token of the answer. Those after a stop token have no meaning."""
        self._has_ended = self._has_ended or token_id in self._stop_ids
        return not (self._has_ended or self._cannot_go_on)

    def take(self, token_ids: list[int]) -> None:
        """Go on by tokens of the answer."""
        for token_id in token_ids:
            if not self.goes_on_by(token_id):
                return
            self.matcher.consume_token(token_id)
            self.note_error()

    def complete(self, words_W: memoryview, is_open: bool) -> None:
        """Make the matcher's mask one of the row's: uint32 [W], token 33 is bit 1 of word 1. In place."""
        if not is_open or self.note_error():
            self._allow_stops_only(words_W)
            return
        # The table has one token more than the model, which ends a text for the library.
        _set_bit(words_W, self._vocab_size, False)
        # A stop token may have text that the grammar means too. It ends the answer all the same.
        is_complete = self.matcher.is_accepting()
        for token_id in self._stop_ids:
            _set_bit(words_W, token_id, is_complete)
        if words_W == memoryview(bytes(words_W.nbytes)).cast("I"):
            self.fail("the grammar cannot go on: no token of this model continues the text")
            self._cannot_go_on = True
            self._allow_stops_only(words_W)

    def note_error(self) -> bool:
        """Return whether the grammar cannot go on, after a look at the matcher."""
        if not self._cannot_go_on and self.matcher.is_error():
            self._cannot_go_on = True
            self.fail(f"the grammar cannot go on: {self.matcher.get_error().splitlines()[0][:300]}")
        return self._cannot_go_on

    def fail(self, why: str) -> None:
        """Note the first reason to end the row."""
        self.failure = self.failure or why

    def _allow_stops_only(self, words_W: memoryview) -> None:
        words_W[:] = memoryview(bytes(words_W.nbytes)).cast("I")
        for token_id in self._stop_ids:
            _set_bit(words_W, token_id, True)


def _set_bit(words_W: memoryview, number: int, value: bool) -> None:
    word, bit = number // WORD_BITS, 1 << number % WORD_BITS
    words_W[word] = words_W[word] | bit if value else words_W[word] & ~bit
