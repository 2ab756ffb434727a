"""What a worker lets an answer be: the tokens that its grammar allows, one after the other."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mgpu.protocol.internal.grammars import new_matcher, token_table
from mgpu.protocol.internal.worker_messages import Vocabulary
from mgpu.worker.sampling.grammar_state import WORD_BITS, GrammarState

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class GrammarFollower:
    """One answer that follows a grammar, by the code and the library of the workers."""

    def __init__(
        self, grammar: str, vocabulary: Vocabulary, stop_ids: list[int], table: "LLTokenizer | None" = None
    ) -> None:
        self._size = len(vocabulary.tokens)
        matcher = new_matcher(table or token_table(vocabulary), grammar)
        assert not matcher.is_error(), matcher.get_error()
        self._state = GrammarState(matcher, stop_ids, self._size)

    def allowed(self) -> set[int]:
        """Return the tokens that may come next."""
        words = memoryview(bytearray(self._state.matcher.compute_bitmask())).cast("I")
        self._state.complete(words, self._state.is_open)
        assert not self._state.failure
        return {at for at in range(self._size) if words[at // WORD_BITS] >> at % WORD_BITS & 1}

    def take(self, token_ids: Iterable[int]) -> None:
        """Go on by tokens, each of which must be allowed."""
        for token_id in token_ids:
            assert token_id in self.allowed(), token_id
            self._state.take([token_id], 60.0)
