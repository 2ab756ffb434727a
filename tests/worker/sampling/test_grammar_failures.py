"""Whatever fails at a grammar ends its row with an error. Other rows go on, and so does the worker."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("llguidance")

from llguidance import LLExecutor, LLMatcher

from harness.answers.grammar_rows import CPU, EOS, PADDED, TOKENS, VOCABULARY, allowed, answers, of, plan_of, states_of
from mgpu.protocol.internal import grammars as library
from mgpu.protocol.internal.worker_messages import RowSampling
from mgpu.worker.sampling import grammar_patience, grammars
from mgpu.worker.sampling.grammar_masks import MaskMaker
from mgpu.worker.sampling.grammar_state import MAX_AHEAD_S, TOKEN_S, GrammarState
from mgpu.worker.sampling.grammars import Grammars
from mgpu.worker.state.rows import RowTable


class Panic(BaseException):
    """As pyo3 raises a panic."""


RAISED = [ValueError("x"), MemoryError(), Panic("index out of bounds")]
GOOD = "/[ab]{4}/"


class BreakingMatcher:
    """A matcher of which one method raises, and those whose names begin with it."""

    def __init__(self, matcher: LLMatcher, method: str, error: BaseException) -> None:
        self._matcher, self._method, self._error = matcher, method, error

    def __getattr__(self, name: str) -> object:
        if name.startswith(self._method):
            raise self._error
        return getattr(self._matcher, name)

    def deep_copy(self) -> "BreakingMatcher":
        return BreakingMatcher(self._matcher.deep_copy(), self._method, self._error)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def break_bad_ones(monkeypatch: pytest.MonkeyPatch, of_matcher: Callable[[LLMatcher], object]) -> None:
    """Let what compiles a grammar with the word BAD return something else."""

    def compiled(tokenizer: object, text: str) -> object:
        matcher = library.new_matcher(tokenizer, text)  # type: ignore[arg-type]
        return of_matcher(matcher) if "BAD" in text else matcher

    monkeypatch.setattr(grammars, "new_matcher", compiled)


def check_that_only_the_bad_row_ends() -> None:
    mixed, alone = [of(GOOD), of('"BAD"'), of(GOOD, temperature=1.0, seed=3)], [of(GOOD)]
    tokens, failures = answers(mixed, 6)
    assert [index for index, _ in failures] == [1]
    assert "internal error" in failures[0][1]
    assert tokens[0] == answers(alone, 6)[0][0]
    assert EOS in tokens[1]
    assert EOS in tokens[2]


@pytest.mark.parametrize("error", RAISED)
def test_a_grammar_that_cannot_be_compiled_ends_its_row(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(matcher: LLMatcher) -> object:
        raise error

    break_bad_ones(monkeypatch, fail)
    check_that_only_the_bad_row_ends()


@pytest.mark.parametrize("error", RAISED)
@pytest.mark.parametrize(
    "method", ["consume_token", "unsafe_compute_mask_ptr", "is_accepting", "is_stopped", "is_error", "get_error"]
)
def test_a_matcher_that_raises_ends_its_row(monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException) -> None:
    if method == "get_error":
        break_bad_ones(monkeypatch, lambda matcher: BreakingMatcher(broken(matcher), method, error))
    else:
        break_bad_ones(monkeypatch, lambda matcher: BreakingMatcher(matcher, method, error))
    check_that_only_the_bad_row_ends()


def broken(matcher: LLMatcher) -> LLMatcher:
    copy = matcher.deep_copy()
    copy.consume_token(ord("!"))
    assert copy.is_error()
    return copy


@pytest.mark.parametrize("what", ["token_table", "_new_maker"])
def test_without_the_library_rows_with_a_grammar_end_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*_: object) -> object:
        raise ImportError("no llguidance")

    monkeypatch.setattr(grammars, what, fail)
    tokens, failures = answers([of(GOOD), RowSampling(), of(GOOD)], 3)
    assert [index for index, _ in failures] == [0, 2]
    assert tokens[0] == tokens[2] == [EOS] * 3
    assert tokens[1] == answers([RowSampling()] * 3, 3)[0][1]


def test_where_no_thread_can_be_started_rows_with_a_grammar_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoThreads:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def submit(self, *_: object) -> object:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(grammars, "ThreadPoolExecutor", NoThreads)
    tokens, failures = answers([of(GOOD), RowSampling()], 2)
    assert [index for index, _ in failures] == [0]
    assert tokens[0] == [EOS] * 2


def test_where_the_library_can_start_no_threads_masks_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import llguidance

    expected = answers([of(GOOD), of(GOOD)], 6)

    def refuse(num_threads: int) -> object:
        raise ValueError("thread pool")

    monkeypatch.setattr(llguidance, "LLExecutor", refuse)
    assert answers([of(GOOD), of(GOOD)], 6) == expected


class FailingExecutor:
    """The library's threads, of which one fails after it has worked on a part of the rows."""

    def __init__(self, method: str) -> None:
        self._real, self._method, self.num_failures = LLExecutor(num_threads=1), method, 0

    def consume_token_par(self, pairs: list[tuple[LLMatcher, int]]) -> None:
        self._real.consume_token_par(pairs[:1] if self._method == "consume" else pairs)
        self._fail("consume")

    def unsafe_compute_mask_ptr(self, pairs: list[tuple[LLMatcher, int]], *where: int) -> None:
        self._real.unsafe_compute_mask_ptr(pairs, *where)
        self._fail("mask")

    def _fail(self, method: str) -> None:
        if method == self._method:
            self.num_failures += 1
            raise Panic(method)


@pytest.mark.parametrize("method", ["consume", "mask"])
def test_a_failure_of_rows_together_costs_no_row_a_token(method: str) -> None:
    texts = ("/a[b-c]+/", '"ax"', "/[a-c]{3}/")
    plain, failing = MaskMaker(LLExecutor(num_threads=1), len(TOKENS)), FailingExecutor(method)
    expected, found = states_of(*texts), states_of(*texts)
    makers = (plain, expected), (MaskMaker(failing, len(TOKENS)), found)  # type: ignore[arg-type]
    assert torch.equal(*(maker.masks(states) for maker, states in makers))
    for tokens in ("aaa", "bxb", "cbc"):
        assert torch.equal(*(maker.advance(states, [*map(ord, tokens)]) for maker, states in makers))
    assert failing.num_failures
    assert [bool(state.failure) for state in found] == [False, True, False]


def test_a_grammar_that_is_not_ready_in_time_ends_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def wait(matcher: LLMatcher) -> LLMatcher:
        release.wait(30)
        return matcher

    break_bad_ones(monkeypatch, wait)
    monkeypatch.setattr(grammar_patience, "MOST_S", 0.1)
    try:
        tokens, failures = answers([of('"BAD"'), RowSampling()], 3)
    finally:
        release.set()
    assert failures == [(0, "the grammar was not ready within 0.1 s; ask for less")]
    assert tokens[0] == [EOS] * 3


def test_a_grammar_that_is_given_up_holds_no_later_one_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def wait(matcher: LLMatcher) -> LLMatcher:
        release.wait(30)
        return matcher

    break_bad_ones(monkeypatch, wait)
    monkeypatch.setattr(grammar_patience, "MOST_S", 0.2)
    rank, rows = Grammars(8, PADDED, CPU), RowTable(8, 64, 16, 8, CPU)
    rank.use(VOCABULARY)
    try:
        for texts in ([f'"BAD{number}"' for number in range(6)], [GOOD]):
            plan = plan_of([of(text) for text in texts], [[] for _ in texts])
            rows.apply(plan)
            rank.follow(plan)
            monkeypatch.setattr(grammar_patience, "LEAST_S", 5.0 if texts == [GOOD] else 0.05)
            numbers, positions = list(range(len(texts))), [2] * len(texts)
            request = rows.request(numbers, positions, torch.tensor(numbers), torch.tensor(positions))
            failures = rank.wait(request)
            assert [index for index, _ in failures] == ([] if texts == [GOOD] else numbers)
    finally:
        release.set()


def test_steps_wait_less_after_waits_in_vain() -> None:
    now_s = 0.0
    patience = grammar_patience.Patience(lambda: now_s)
    assert patience.limit_s() == grammar_patience.MOST_S
    patience.charge(2.0)
    assert patience.limit_s() == grammar_patience.LEAST_S
    now_s = 10.0
    assert patience.limit_s() == pytest.approx(0.5)
    now_s = 100.0
    assert patience.limit_s() == grammar_patience.MOST_S


def test_a_rank_that_reports_no_failures_gives_no_row_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def wait(matcher: LLMatcher) -> LLMatcher:
        release.wait(30)
        return matcher

    break_bad_ones(monkeypatch, wait)
    monkeypatch.setattr(grammars, "_PEER_WAIT_S", 0.1)
    peer, rows = Grammars(8, PADDED, CPU, reports=False), RowTable(8, 64, 16, 8, CPU)
    peer.use(VOCABULARY)
    plan = plan_of([of('"BAD"')], [[]])
    rows.apply(plan)
    try:
        peer.follow(plan)
        with pytest.raises(TimeoutError):
            peer.wait(rows.request([0], [2], torch.tensor([0]), torch.tensor([2])))
    finally:
        release.set()


def test_an_answer_that_takes_too_long_to_follow_again_is_given_up() -> None:
    [state] = states_of("/a+/")
    with pytest.raises(TimeoutError):
        state.take([ord("a")] * 100, -1.0)


def test_a_grammar_may_be_slow_at_times_but_not_always() -> None:
    [slow], [at_times] = states_of("/a+/"), states_of("/a+/")
    for number in range(100):
        slow.note_time(3 * TOKEN_S)
        at_times.note_time(0.1 if number % 50 == 0 else 0.0)
    assert "more than" in slow.failure
    assert not at_times.failure
    [once] = states_of("/a+/")
    once.note_time(MAX_AHEAD_S + 2 * TOKEN_S)
    assert once.failure


def test_a_state_without_a_matcher_allows_stops_only() -> None:
    state = GrammarState(None, [EOS], len(TOKENS), "why")
    maker = MaskMaker(LLExecutor(num_threads=1), len(TOKENS))
    assert [allowed(maker.masks([state])[0]), allowed(maker.advance([state], [ord("a")])[0])] == [{EOS}, {EOS}]
    assert state.failure == "why"


DEEP = """
import sys
from concurrent.futures import ThreadPoolExecutor
from llguidance import LLTokenizer
from mgpu.orchestrator.gateway.text.grammars.grammar import checked_grammar
from mgpu.protocol.internal.grammars import new_matcher
from mgpu.worker.sampling.grammars import _started

def grammar_of(depth):
    rules = [f'R{number}: "x" R{number + 1} | "y"' for number in range(depth)]
    return "\\n".join(["start: R0", *rules, f'R{depth}: "a"'])

text = checked_grammar({"grammar": grammar_of(300)})
for depth in (300, 3000):
    pool, followed = ThreadPoolExecutor(1), text.replace(grammar_of(300), grammar_of(depth))
    assert str(depth - 1) in followed
    matcher = _started(pool, new_matcher, LLTokenizer("byte"), followed).result()
    assert not matcher.is_error(), matcher.get_error()
    _started(pool, matcher.compute_bitmask).result()
print("followed", flush=True)
checked_grammar({"grammar": grammar_of(3000)})
"""


def test_a_grammar_that_overflows_a_stack_does_so_while_it_is_checked() -> None:
    """In a process that may end, and at a tenth of the depth that workers follow."""
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "followed\n"), done.stderr
