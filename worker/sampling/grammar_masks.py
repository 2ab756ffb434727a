"""Compute the masks of many rows together, in the library's own threads.

A mask takes some 100 µs of CPU time, taking a token half of that, and both hold Python's lock if they are asked for row
by row. For 64 rows that is longer than a step. So all rows of a step are handed over at once. What is left to Python
are a few µs a row.
"""

# N rows, W words of 32 tokens

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgpu.worker.sampling.grammar_state import WORD_BITS, GrammarState

if TYPE_CHECKING:
    from llguidance import LLExecutor

MAX_MASK_S = 0.25
"""CPU time for the tokens of one position. Ordinary grammars take less than a thousandth of it."""


class MaskMaker:
    """Brings rows forward and computes what may come next."""

    def __init__(self, executor: "LLExecutor", vocab_size: int) -> None:
        self._executor = executor
        self._row_words = vocab_size // WORD_BITS + 1  # the library has one token more than the model
        self._row_bytes = self._row_words * WORD_BITS // 8

    def advance(self, states: Sequence[GrammarState], token_ids: Sequence[int]) -> Tensor:
        """Let each row go on by its token; return the masks after it, int32 [N, W]."""
        going = [
            (state.matcher, token_id)
            for state, token_id in zip(states, token_ids, strict=True)
            if state.goes_on_by(token_id)
        ]
        if going:
            self._executor.consume_token_par(going)
        for state in states:
            state.note_error()
        return self.masks(states)

    def masks(self, states: Sequence[GrammarState]) -> Tensor:
        """Return which tokens may come next, int32 [N, W]: token 33 is bit 1 of word 1."""
        data = bytearray(len(states) * self._row_bytes)
        words_NW = torch.frombuffer(data, dtype=torch.int32).view(len(states), -1)
        is_open = [state.is_open for state in states]
        alone = [index for index, state in enumerate(states) if is_open[index] and state.is_suspect]
        together = [index for index, state in enumerate(states) if is_open[index] and not state.is_suspect]
        for index in alone:
            self._mask_alone(states[index], words_NW[index])
        if together:
            self._masks_together([(states[index], index) for index in together], words_NW)
        view = memoryview(data).cast("I")
        for index, state in enumerate(states):
            state.complete(view[index * self._row_words : (index + 1) * self._row_words], is_open[index])
        return words_NW

    def _mask_alone(self, state: GrammarState, words_W: Tensor) -> None:
        began_s = time.thread_time()
        state.matcher.unsafe_compute_mask_ptr(words_W.data_ptr(), self._row_bytes)
        state.is_suspect = False
        if (took_s := time.thread_time() - began_s) > MAX_MASK_S:
            state.fail(f"the grammar takes {took_s:.2f} s for one token, the limit is {MAX_MASK_S:g} s")

    def _masks_together(self, rows: list[tuple[GrammarState, int]], words_NW: Tensor) -> None:
        """Compute masks in threads. When that took long, each row is timed by itself at its next token."""
        began_s = time.monotonic()
        pairs = [(state.matcher, index) for state, index in rows]
        self._executor.unsafe_compute_mask_ptr(pairs, words_NW.data_ptr(), self._row_bytes, len(words_NW))
        if time.monotonic() - began_s > MAX_MASK_S:
            for state, _ in rows:
                state.is_suspect = True
