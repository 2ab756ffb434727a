"""Follow one row's answer through its grammar: how far it has come, and which stop tokens may end it."""

import itertools
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

WORD_BITS = 32
MAX_AHEAD_S = 0.25
"""CPU time that an answer's tokens may take beyond `TOKEN_S` each. Ordinary grammars take less than a thousandth."""
TOKEN_S = 0.005
"""A grammar that always takes longer would slow the other rows of its steps down."""
_TOKENS_AT_ONCE = 64
_MAX_LOGGED = 16
"""Most different errors that are logged: clients choose the grammars, and must not fill the log."""

log = logging.getLogger(__name__)
_logged: set[str] = set()


class GrammarState:
    """How far one answer has come. Not for several threads at once.

    A grammar that cannot go on has a ``failure``. Then only stop tokens are allowed, until the orchestrator ends the
    row. So ends a grammar at which the library raises an exception: matchers are deterministic, so it is raised on all
    ranks. A grammar whose tokens take too long has a ``failure`` too, but goes on until then: ranks differ in speed,
    only one of them reports failures, and all must choose the same token.
    """

    def __init__(self, compiled: "LLMatcher | None", stop_ids: list[int], vocab_size: int, failure: str = "") -> None:
        """``compiled`` is not changed. It is None for an answer that cannot begin, because of ``failure``."""
        self.failure = failure
        self.is_suspect = True
        """Whether the next token is timed by itself."""
        self._compiled = compiled
        self._taken: list[int] = []
        self._stop_ids = frozenset(stop_ids)
        self._vocab_size = vocab_size
        self._ahead_s = 0.0
        self._has_ended = False
        self._cannot_go_on = compiled is None
        self._matcher = compiled
        self.restart()

    @property
    def matcher(self) -> "LLMatcher":
        """The library's state. There is one while `is_open`."""
        assert self._matcher is not None
        return self._matcher

    @property
    def is_open(self) -> bool:
        """Whether the matcher says what may come next."""
        return not (self._has_ended or self._cannot_go_on or self.matcher.is_stopped())

    def restart(self) -> None:
        """Come to the same place with a new matcher: after an exception, nobody knows what the old one has taken."""
        if self._compiled is None or self._cannot_go_on:
            return
        try:
            self._matcher = self._compiled.deep_copy()
            self._matcher.consume_tokens(self._taken)
            self.note_error()
        except BaseException as error:
            self.break_off(error)

    def goes_on_by(self, token_id: int) -> bool:
        """Note the next token; return whether the matcher is to take it. Tokens after a stop token have no meaning."""
        self._has_ended = self._has_ended or token_id in self._stop_ids
        goes_on = not (self._has_ended or self._cannot_go_on)
        if goes_on:
            self._taken.append(token_id)
        return goes_on

    def take(self, token_ids: list[int], limit_s: float) -> None:
        """Go on by tokens of an answer that goes on here. TimeoutError if that takes too long."""
        until_s = time.monotonic() + limit_s
        going = list(itertools.takewhile(self.goes_on_by, token_ids))
        for first in range(0, len(going), _TOKENS_AT_ONCE):
            if time.monotonic() > until_s:
                raise TimeoutError
            self.matcher.consume_tokens(going[first : first + _TOKENS_AT_ONCE])
        self.note_error()

    def complete(self, words_W: memoryview, has_mask: bool) -> None:
        """Make the matcher's mask one of the row's: uint32 [W], token 33 is bit 1 of word 1. In place."""
        try:
            if has_mask and not self.note_error():
                self._add_stops(words_W)
                if words_W != memoryview(bytes(words_W.nbytes)).cast("I"):
                    return
                self._end("the grammar cannot go on: no token of this model continues the text")
        except BaseException as error:
            self.break_off(error)
        self._allow_stops_only(words_W)

    def note_error(self) -> bool:
        """Return whether the grammar cannot go on, after a look at the matcher."""
        if not self._cannot_go_on and self.matcher.is_error():
            self._end(f"the grammar cannot go on: {self.matcher.get_error().splitlines()[0][:300]}")
        return self._cannot_go_on

    def note_time(self, took_s: float) -> None:
        """Count the CPU time of a token that was timed by itself."""
        self.is_suspect = took_s > TOKEN_S
        self._ahead_s = max(0.0, self._ahead_s + took_s - TOKEN_S)
        if self._ahead_s > MAX_AHEAD_S:
            self.failure = self.failure or (
                f"the grammar takes {took_s:.3f} s for a token: its tokens have taken {MAX_AHEAD_S:g} s more than "
                f"{TOKEN_S:g} s each, which is the limit"
            )

    def break_off(self, error: BaseException) -> None:
        """End the row because of an exception. A panic of the library, which is written in Rust, is no `Exception`."""
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise error
        log_error("the grammar of a row failed, and only that row ends", error)
        self._end(f"the grammar cannot go on: internal error ({type(error).__name__})")

    def _end(self, why: str) -> None:
        self._cannot_go_on = True
        self.failure = self.failure or why

    def _add_stops(self, words_W: memoryview) -> None:
        # The table has one token more than the model, which ends a text for the library.
        _set_bit(words_W, self._vocab_size, False)
        # A stop token may have text that the grammar means too. It ends the answer all the same.
        is_complete = self.matcher.is_accepting()
        for token_id in self._stop_ids:
            _set_bit(words_W, token_id, is_complete)

    def _allow_stops_only(self, words_W: memoryview) -> None:
        words_W[:] = memoryview(bytes(words_W.nbytes)).cast("I")
        for token_id in self._stop_ids:
            _set_bit(words_W, token_id, True)


def _set_bit(words_W: memoryview, number: int, value: bool) -> None:
    word, bit = number // WORD_BITS, 1 << number % WORD_BITS
    words_W[word] = words_W[word] | bit if value else words_W[word] & ~bit


def log_error(what: str, error: BaseException) -> None:
    """Log an error that a grammar has led to, each once."""
    text = f"{type(error).__name__}: {error}"[:200]
    if text not in _logged and len(_logged) < _MAX_LOGGED:
        _logged.add(text)
        log.error("%s", what, exc_info=error)
