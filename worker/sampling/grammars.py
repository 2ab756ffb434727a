"""Let rows choose only tokens that their grammars allow, without waiting for the host between steps.

A row's mask for the next token is known only when its last token is. So that nobody waits for it, it is computed in
threads beside the forward pass of the next step. Each rank that chooses tokens does all of this by itself: matchers are
deterministic, so all ranks get the same masks without a message. For rows with a grammar, on a GPU:

    host      launch 1 | launch 2's forward | wait for masks 2 | launch 2's sampling | launch 3's forward | …
    GPU                | step 1: forward, choose A | step 2: forward ………………………… | choose B | step 3 …
    threads            | masks 1                   | take A, masks 2 |           | take B, masks 3 | …

Rows without a grammar in the same step wait with it, for less than a forward pass takes. Steps without such rows are as
they were. The state of a row is a function of its grammar and its tokens. So a row that comes again, after preemption
or on new workers, takes its emitted tokens first (`GrammarState`); nothing else is kept. A token that was chosen in
vain, because the row had ended, changes only the state of a row that is freed.

Whatever fails ends a row and no worker: an exception or a panic of the library, a thread that cannot be started, a
grammar that is not ready in time. `wait` is where a step finds out. It gives such a row a state in which only stop
tokens are allowed, and reports the failure. Nothing ends a thread that works on for such a row, so the others go on in
new ones.
"""

# S rows that sample, N of them with a grammar, V tokens of a vocabulary slice, W words of 32 tokens

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor

from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.internal.grammars import FOLLOW_STACK_BYTES, new_matcher, token_table, with_stack_size
from mgpu.protocol.internal.worker_messages import NewRow, RowGrammar, StepPlan, Vocabulary
from mgpu.worker.errors import BadPlan
from mgpu.worker.sampling.grammar_masks import MaskMaker
from mgpu.worker.sampling.grammar_patience import Patience
from mgpu.worker.sampling.grammar_state import WORD_BITS, GrammarState, log_error
from mgpu.worker.state.rows import SampleRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_MASK_THREADS = 8
_MOST_COMPILED = 64
"""Grammars that are kept for requests to come: many requests ask for the same one."""
_VOCABULARY_WAIT_S, _PEER_WAIT_S = 5.0, 8.0
"""A step may take 10 s (`Timeouts.hang_timeout_s`). Only the rank that reports failures gives a row up (`Patience`);
the others wait longer, so that they come to the same end or fail."""
_COMPILE_THREADS = 4
"""So that few slow grammars hold no other one up."""
_MOST_LEFT = 4
"""Rows that have been given up and that threads still work on. With more, new rows have no new threads and wait too."""

log = logging.getLogger(__name__)


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class _Row:
    """The state after the row's last token, and what may follow it, as soon as threads have found out."""

    state: "Future[GrammarState]"
    masks: "Future[Tensor]"
    """Of the rows of one step, int32 [N, W]."""
    place: int
    """Of this row among them."""


class Grammars:
    """The grammars of one rank's rows. Threads and tensors exist from the first row with a grammar on."""

    def __init__(self, max_rows: int, padded_vocab: int, device: torch.device, reports: bool = True) -> None:
        """``reports`` is true on the rank whose failures the orchestrator hears of."""
        self._max_rows, self._padded_vocab, self._device = max_rows, padded_vocab, device
        self._patience = Patience() if reports else None
        self._rows: dict[int, _Row] = {}
        self._vocab_size = 0
        self._tokens: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._compiler, self._masker = _new_threads()
        self._left: list[tuple[Future[GrammarState], Future[Tensor]]] = []
        self._maker: Future[MaskMaker] | None = None
        self._words: Tensor | None = None

    def use(self, vocabulary: Vocabulary) -> None:
        """Begin to prepare the tokens of the model."""
        self._vocab_size = len(vocabulary.tokens)
        self._tokens = _started(self._compiler, token_table, vocabulary)
        self._maker = _started(self._compiler, _new_maker, self._vocab_size)

    def follow(self, plan: StepPlan) -> None:
        """Forget rows that the plan frees, and begin with those that are new."""
        if self._rows:
            for row in plan.free_rows:
                self._rows.pop(row, None)
        for new in plan.new_rows:
            if new.sampling.grammar is not None:
                self._rows[new.row] = self._begin(new, new.sampling.grammar)
            else:
                self._rows.pop(new.row, None)

    def wait(self, request: SampleRequest) -> list[tuple[int, str]]:
        """Bring the masks of the rows of a step to the device; return which rows cannot go on, and why."""
        found = self._with_grammar(request)
        if not found:
            return []
        rows = [self._row(request.rows[index]) for index in found]
        self._settle(rows, [request.sampling[index].grammar for index in found])
        words_NW = self._words_of(rows)
        if self._words is None:
            shape = (self._max_rows, words_NW.shape[1])
            self._words = torch.zeros(shape, dtype=torch.int32, device=self._device)
        self._words[self._rows_with_grammar(request, found)] = words_NW.to(self._device, non_blocking=True)
        states = [row.state.result() for row in rows]
        return [(index, state.failure) for index, state in zip(found, states, strict=True) if state.failure]

    def apply(self, logits_SV: Tensor, first_id: int, request: SampleRequest) -> None:
        """Exclude what the masks that `wait` brought do not allow, in place; ids from ``first_id`` on."""
        found = self._with_grammar(request)
        if not found:
            return
        assert self._words is not None
        first_word, end_word = first_id // 32, -(-(first_id + logits_SV.shape[1]) // 32)
        words_NW = self._words[self._rows_with_grammar(request, found), first_word:end_word]
        bits_NW32 = (words_NW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=self._device)) & 1
        start = first_id - 32 * first_word
        excluded_NV = bits_NW32.flatten(1)[:, start : start + logits_SV.shape[1]] == 0
        if len(found) == len(request.rows):
            logits_SV.masked_fill_(excluded_NV, -torch.inf)
        else:
            (found_N,) = self._to_device([found])
            logits_SV[found_N] = logits_SV[found_N].masked_fill_(excluded_NV, -torch.inf)

    def take(self, request: SampleRequest, ids_S: Tensor) -> None:
        """Let threads go on by the tokens of a step, as soon as the device has chosen them."""
        found = self._with_grammar(request)
        if not found:
            return
        ids, chosen = ids_S, None
        if self._device.type == "cuda":
            ids = torch.empty(ids_S.shape, dtype=ids_S.dtype, pin_memory=True)
            ids.copy_(ids_S, non_blocking=True)
            chosen = torch.cuda.Event()  # type: ignore[no-untyped-call]
            chosen.record()
        assert self._maker is not None
        rows = [self._row(request.rows[index]) for index in found]
        states = [row.state.result() for row in rows]
        masks = _started(self._masker, _advance, self._maker, states, ids, found, chosen)
        for place, row in enumerate(rows):
            row.masks, row.place = masks, place

    # -- in threads ----------------------------------------------------------------------------------------------------

    def _begin(self, new: NewRow, grammar: RowGrammar) -> _Row:
        if self._tokens is None:
            raise BadPlan(f"row {new.row} has a grammar, but the vocabulary has not come")
        emitted = int32_array(new.token_ids)[new.prompt_len :].tolist()
        state = _started(self._compiler, self._state, grammar, emitted)
        return _Row(state, _started(self._compiler, self._first_mask, state), 0)

    def _state(self, grammar: RowGrammar, emitted: list[int]) -> GrammarState:
        assert self._tokens is not None
        with self._cache_lock:
            known = self._compiled.pop(grammar.text, None)
        matcher = known or new_matcher(self._tokens.result(), grammar.text)
        with self._cache_lock:
            self._compiled[grammar.text] = matcher
            if len(self._compiled) > _MOST_COMPILED:
                self._compiled.popitem(last=False)
        state = GrammarState(matcher, grammar.stop_ids, self._vocab_size)
        state.take(emitted, _PEER_WAIT_S)
        return state

    def _first_mask(self, state: "Future[GrammarState]") -> Tensor:
        assert self._maker is not None
        return self._maker.result().masks([state.result()])

    # -- failures ------------------------------------------------------------------------------------------------------

    def _settle(self, rows: list[_Row], grammars: list[RowGrammar | None]) -> None:
        """Wait until the masks of a step are there. Rows for which that fails may only stop from now on."""
        if self._tokens is not None and self._maker is not None:
            wait([self._tokens], _VOCABULARY_WAIT_S)
            wait([self._maker], _VOCABULARY_WAIT_S)
        limit_s = self._patience.limit_s() if self._patience is not None else _PEER_WAIT_S
        began_s, late = time.monotonic(), []
        until_s = began_s + limit_s
        for row, grammar in zip(rows, grammars, strict=True):
            assert grammar is not None
            try:
                row.state.result(max(0.0, until_s - time.monotonic()))
                row.masks.result(max(0.0, until_s - time.monotonic()))
            except TimeoutError:
                if self._patience is None:
                    raise
                late.append((row.state, row.masks))
                self._give_up(row, grammar, f"the grammar was not ready within {limit_s:.2g} s; ask for less")
            except BaseException as error:  # the library panics with exceptions that are no `Exception`
                if isinstance(error, (SystemExit, KeyboardInterrupt)):
                    raise
                log_error("the grammar of a row failed, and only that row ends", error)
                self._give_up(row, grammar, f"the grammar cannot be followed: internal error ({type(error).__name__})")

        if late and self._patience is not None:
            self._patience.charge(time.monotonic() - began_s)
            self._leave_threads(late)

    def _leave_threads(self, late: "list[tuple[Future[GrammarState], Future[Tensor]]]") -> None:
        """Let other rows have new threads, and new ones of the library too."""
        self._left = [each for each in self._left if not (each[0].done() and each[1].done())]
        if len(self._left) >= _MOST_LEFT:
            return
        self._left += late
        for pool in (self._compiler, self._masker):
            pool.shutdown(wait=False)
        self._compiler, self._masker = _new_threads()
        self._maker = _started(self._compiler, _new_maker, self._vocab_size)

    def _give_up(self, row: _Row, grammar: RowGrammar, why: str) -> None:
        state = GrammarState(None, grammar.stop_ids, self._vocab_size, why)
        row.state, row.masks, row.place = Future(), Future(), 0
        row.state.set_result(state)
        row.masks.set_result(MaskMaker(None, self._vocab_size).masks([state]))

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _with_grammar(self, request: SampleRequest) -> list[int]:
        if not self._rows:
            return []
        return [index for index, sampling in enumerate(request.sampling) if sampling.grammar is not None]

    def _row(self, number: int) -> _Row:
        row = self._rows.get(number)
        if row is None:
            raise BadPlan(f"row {number} samples by a grammar that has not come")
        return row

    def _rows_with_grammar(self, request: SampleRequest, found: list[int]) -> Tensor:
        """Return the row numbers of those of a step that have a grammar, int64 [N]."""
        if len(found) == len(request.rows):
            return request.rows_S
        return request.rows_S[self._to_device([found])[0]]

    def _words_of(self, rows: list[_Row]) -> Tensor:
        """Return masks as int32 [N, W], in memory from which a copy to a GPU runs in the background."""
        masks = rows[0].masks.result()
        is_one_step = all(row.masks is rows[0].masks and row.place == place for place, row in enumerate(rows))
        if len(masks) != len(rows) or not is_one_step:
            masks = torch.stack([row.masks.result()[row.place] for row in rows])
        shape = (len(rows), -(-self._padded_vocab // WORD_BITS))
        words_NW = torch.zeros(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        width = min(shape[1], masks.shape[1])
        words_NW[:, :width] = masks[:, :width]
        return words_NW

    def _to_device(self, columns: list[list[int]]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(column, dtype=torch.int64).to(self._device) for column in columns)


def _started(pool: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
    """Return what a thread is to compute. One that cannot be started, at a limit of processes, fails like the work."""
    try:
        return with_stack_size(FOLLOW_STACK_BYTES, lambda: pool.submit(work, *args, **kwargs))
    except RuntimeError as error:
        failed: Future[T] = Future()
        failed.set_exception(error)
        return failed


def _new_threads() -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
    """Return threads that compile, and one that computes masks meanwhile."""
    compiler = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="grammar-compiler")
    return compiler, ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")


def _new_maker(vocab_size: int) -> MaskMaker:
    import llguidance

    os.environ.setdefault("RUST_MIN_STACK", str(FOLLOW_STACK_BYTES))  # of the library's own threads
    threads = max(1, min(_MOST_MASK_THREADS, len(os.sched_getaffinity(0)) // 2))
    try:
        return MaskMaker(llguidance.LLExecutor(num_threads=threads), vocab_size)
    except Exception as error:  # at a limit of processes
        log.warning("masks of grammars are computed one by one, because no threads can be started: %s", error)
        return MaskMaker(None, vocab_size)


def _advance(
    maker: "Future[MaskMaker]",
    states: list[GrammarState],
    ids: Tensor,
    found: list[int],
    chosen: torch.cuda.Event | None,
) -> Tensor:
    if chosen is not None:
        chosen.synchronize()
    chosen_ids = ids.tolist()
    return maker.result().advance(states, [chosen_ids[index] for index in found])
