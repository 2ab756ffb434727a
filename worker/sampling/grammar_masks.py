"""Compute the masks of many rows together, in the library's own threads.

A mask takes some 100 µs of CPU time, taking a token half of that, and both hold Python's lock if they are asked for row
by row. For 64 rows that is longer than a step. So all rows of a step are handed over at once. What is left to Python
are a few µs a row.

A row is computed by itself at its first token, while it is slow, and when computing the rows of its step together was
slow or raised an exception. So the row that is the cause is found, and only that one ends.
"""

# N rows, W words of 32 tokens

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgpu.worker.sampling.grammar_state import WORD_BITS, GrammarState, log_error

if TYPE_CHECKING:
    from llguidance import LLExecutor

SLOW_STEP_S = 0.02
"""For the rows of a step that are computed together. More, and each is timed by itself at its next token."""


class MaskMaker:
    """Brings rows forward and computes what may come next. Whatever fails is the failure of one row."""

    def __init__(self, executor: "LLExecutor | None", vocab_size: int) -> None:
        """Without ``executor``, the library's threads, each row is computed by itself."""
        self._executor = executor
        self._row_words = vocab_size // WORD_BITS + 1  # the library has one token more than the model
        self._row_bytes = self._row_words * WORD_BITS // 8

    def advance(self, states: Sequence[GrammarState], token_ids: Sequence[int]) -> Tensor:
        """Let each row go on by its token; return the masks after it, int32 [N, W]."""
        going = [state.goes_on_by(token_id) for state, token_id in zip(states, token_ids, strict=True)]
        return self._masks(states, [token if goes else None for token, goes in zip(token_ids, going, strict=True)])

    def masks(self, states: Sequence[GrammarState]) -> Tensor:
        """Return which tokens may come next, int32 [N, W]: token 33 is bit 1 of word 1."""
        return self._masks(states, [None] * len(states))

    def _masks(self, states: Sequence[GrammarState], next_ids: Sequence[int | None]) -> Tensor:
        """Let the rows take their next tokens, those that have one, and return the masks."""
        data = bytearray(len(states) * self._row_bytes)
        words_NW = torch.frombuffer(data, dtype=torch.int32).view(len(states), -1)
        has_mask = [False] * len(states)
        together = [i for i, state in enumerate(states) if not state.is_suspect and self._executor is not None]
        if together and not self._compute_together(states, next_ids, together, words_NW, has_mask):
            next_ids, together = [None if i in together else token for i, token in enumerate(next_ids)], []
        for index in sorted(set(range(len(states))) - set(together)):
            has_mask[index] = self._compute_alone(states[index], next_ids[index], words_NW[index])
        view = memoryview(data).cast("I")
        for index, state in enumerate(states):
            state.complete(view[index * self._row_words : (index + 1) * self._row_words], has_mask[index])
        return words_NW

    def _compute_alone(self, state: GrammarState, next_id: int | None, words_W: Tensor) -> bool:
        """Compute one row's mask; return whether it has one."""
        began_s = time.thread_time()
        try:
            if next_id is not None:
                state.matcher.consume_token(next_id)
                state.note_error()
            if has_mask := state.is_open:
                state.matcher.unsafe_compute_mask_ptr(words_W.data_ptr(), self._row_bytes)
            return has_mask
        except BaseException as error:
            state.break_off(error)
            return False
        finally:
            state.note_time(time.thread_time() - began_s)

    def _compute_together(
        self,
        states: Sequence[GrammarState],
        next_ids: Sequence[int | None],
        indices: list[int],
        words_NW: Tensor,
        has_mask: list[bool],
    ) -> bool:
        """Compute masks in threads. Return False if that failed; then the rows have only taken their tokens."""
        assert self._executor is not None
        began_s = time.monotonic()
        try:
            going = [(states[i].matcher, token) for i in indices if (token := next_ids[i]) is not None]
            if going:
                self._executor.consume_token_par(going)
            for i in indices:
                states[i].note_error()
            pairs = [(states[i].matcher, i) for i in indices if states[i].is_open]
            if pairs:
                self._executor.unsafe_compute_mask_ptr(pairs, words_NW.data_ptr(), self._row_bytes, len(words_NW))
            for _, i in pairs:
                has_mask[i] = True
        except BaseException as error:
            if isinstance(error, (SystemExit, KeyboardInterrupt)):
                raise
            log_error("masks could not be computed together; each row is computed by itself", error)
            for i in indices:
                states[i].restart()
            return False
        if time.monotonic() - began_s > SLOW_STEP_S:
            for i in indices:
                states[i].is_suspect = True
        return True
