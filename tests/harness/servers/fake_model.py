"""A model without weights: its next token is a hash of all tokens before it, read back from a simulated KV pool.

Whatever the scheduler does wrong with blocks, rows, positions or steps changes a token or breaks an assertion.
"""

from array import array
from dataclasses import dataclass

from mgpu.protocol.internal.worker_messages import NewRow, StepPlan
from mgpu.protocol.model.attention_facts import Sight, first_key

VOCAB = 1000
_EMPTY = 17


def mix(state: int, token: int) -> int:
    return (state * 1_000_003 + token + 1) % (2**61 - 1)


def solo_tokens(prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    """What the model generates for one request that has it alone."""
    state = _EMPTY
    for token in prompt:
        state = mix(state, token)
    emitted: list[int] = []
    while len(emitted) < max_tokens and not (emitted and emitted[-1] in stop_ids):
        emitted.append(state % VOCAB)
        state = mix(state, emitted[-1])
    return emitted


@dataclass
class _Row:
    tokens: list[int]
    blocks: list[int]
    sampled_at: int = -(10**9)
    state: tuple[int, int] = (0, _EMPTY)
    """Of a model with linear layers: how many tokens it stands for, and their hash."""


class FakeModel:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_stages: int = 1,
        has_states: bool = False,
        num_pages: int = 0,
        sight: Sight = (None, False),
    ) -> None:
        self.has_states = has_states
        self.page_of: dict[int, int] = {}
        """Of a model with window layers."""
        self._pages: list[list[int | None]] = [[None] * block_size for _ in range(num_pages)]
        self._sight = sight
        self.slots: dict[int, tuple[int, int]] = {}
        """States that were copied."""
        self.rows: dict[int, _Row] = {}
        self.computed_tokens = 0
        self._kv: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._size = block_size
        self._stages = num_stages
        self._last_step = -1

    def execute(self, plan: StepPlan) -> list[int]:
        """Run one step and give the tokens of the rows that sample."""
        assert plan.step > self._last_step, "steps must be in order"
        self._last_step = plan.step
        for row, slot in zip(plan.save_rows, plan.save_slots, strict=True):
            self.slots[slot] = self.rows[row].state
        for row in plan.free_rows:
            del self.rows[row]
        for new in plan.new_rows:
            self._add(new)
        for row, block in zip(plan.block_rows, plan.block_ids, strict=True):
            self.rows[row].blocks.append(block)
        assert len(set(plan.page_blocks)) == len(plan.page_blocks), "a block takes two pages in one step"
        self.page_of.update(zip(plan.page_blocks, plan.page_ids, strict=True))
        assert len(set(plan.rows)) == len(plan.rows), "a row is planned twice in one step"
        sampled: list[int] = []
        for row, start, count, samples in zip(plan.rows, plan.starts, plan.counts, plan.samples, strict=True):
            token = self._compute(self.rows[row], start, count, plan.step)
            if samples:
                assert start + count == len(self.rows[row].tokens), "a row samples before its last token"
                self.rows[row].tokens.append(token)
                self.rows[row].sampled_at = plan.step
                sampled.append(token)
        return sampled

    def _add(self, new: NewRow) -> None:
        assert new.row not in self.rows, "a row is taken"
        tokens = array("i")
        tokens.frombytes(new.token_ids)
        assert 0 < new.prompt_len <= len(tokens)
        self.rows[new.row] = _Row(list(tokens), list(new.block_ids))
        if new.state_slot >= 0:
            self.rows[new.row].state = self.slots[new.state_slot]

    def _compute(self, row: _Row, start: int, count: int, step: int) -> int:
        assert count > 0
        assert start + count <= len(row.tokens), "a position without a token is computed"
        assert step - row.sampled_at >= self._stages, "a row is planned before its token can be there"
        state = _EMPTY if start == 0 else self._read(row, start - 1)
        for position in range(start, start + count):
            state = mix(state, row.tokens[position])
            self._kv[row.blocks[position // self._size]][position % self._size] = state
            if self._pages:
                self._page(row, position)[position % self._size] = state
        if self._pages:  # all tokens are written before any is read, so a page of the step must not have two blocks
            for position in range(first_key(start, self._sight), start + count):
                known = self._page(row, position)[position % self._size]
                assert known == self._read(row, position), "what a window shows is of other tokens"
        if self.has_states:
            known = (0, _EMPTY) if start == 0 else row.state
            assert known == (start, _EMPTY if start == 0 else self._read(row, start - 1)), "a state of other tokens"
            row.state = start + count, state
        self.computed_tokens += count
        return state % VOCAB

    def _page(self, row: _Row, position: int) -> list[int | None]:
        return self._pages[self.page_of[row.blocks[position // self._size]]]

    def _read(self, row: _Row, position: int) -> int:
        state = self._kv[row.blocks[position // self._size]][position % self._size]
        assert state is not None, "a position that was never computed is read"
        return state
