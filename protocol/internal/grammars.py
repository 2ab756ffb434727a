"""What the check of a grammar and its use share: its bounds, and how llguidance is told the model's tokens.

The library is imported when a grammar is first asked for, and not before. It is recursive, and what overflows its stack
ends the process. So the check has a small stack, and whoever follows a grammar that has passed it a far larger one.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from mgpu.protocol.internal.worker_messages import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CHECK_STACK_BYTES, FOLLOW_STACK_BYTES = 2 << 20, 64 << 20
"""Of threads. Memory is taken as far as it is used."""

CLIENT_RULES = "// the rules of a client"
"""A comment in the text of a grammar whose rules a client wrote."""
MOST_ITEMS, CLIENT_ITEMS = 2_000, 256
"""Alternatives that may be open at one place: 400 optional properties of a schema are 1,600. They cost next to
nothing where they differ. Where each may follow each, as a client can write it, a mask takes 0.18 s of CPU time with
256, 1.2 s with 512 and 5 s with 1,000 (49,152 tokens, AMD EPYC, llguidance 1.9, 2026-12-01)."""
MOST_STEP_ITEMS, CLIENT_STEP_ITEMS = 10_000, 2_000
"""Those of all places within one more token: 2,000 take 0.06 s, and 150 statements of SQL need fewer than 500."""

T = TypeVar("T")


def with_stack_size(nbytes: int, start: Callable[[], T]) -> T:
    """Run ``start``; threads that it starts have a stack of so many bytes."""
    before = threading.stack_size(nbytes)
    try:
        return start()
    finally:
        threading.stack_size(before)


def new_matcher(tokenizer: "LLTokenizer", grammar: str) -> "LLMatcher":
    """Compile a grammar; ask its `is_error` whether that went well."""
    import llguidance

    # The library's defaults, but fewer items and states. A hostile grammar makes as many as it may: 20,000 states take
    # about 40 MB.
    is_clients = CLIENT_RULES in grammar
    limits = llguidance.LLParserLimits(
        max_items_in_row=CLIENT_ITEMS if is_clients else MOST_ITEMS,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=CLIENT_STEP_ITEMS if is_clients else MOST_STEP_ITEMS,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def token_table(vocabulary: Vocabulary) -> "LLTokenizer":
    """Return the library's form of a vocabulary. It takes some tenths of a second to build."""
    import llguidance

    tokens = _Tokens(vocabulary)
    return llguidance.LLTokenizer(tokens, n_vocab=len(tokens.tokens))  # type: ignore[arg-type]


class _Tokens:
    """A tokenizer as the library asks for one. Nothing is cut into tokens: grammars force no tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        # One more token ends a text for the library. Which of the model's tokens do is known for each row only.
        self.tokens = [*vocabulary.tokens, b"<|end of a grammar|>"]
        self.eos_token_id = len(vocabulary.tokens)
        self.special_token_ids: Sequence[int] = [*vocabulary.special_ids, self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        return []
