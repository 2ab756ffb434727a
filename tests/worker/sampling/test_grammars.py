"""Rows with a grammar choose only what it allows, on every rank alike, and the same when they come again."""

import struct
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("llguidance")

from harness.answers.grammar_rows import CPU, EOS, PADDED, TOKENS, allowed, answers, of, states_of
from harness.ranks.rank_threads import run_ranks
from mgpu.protocol.internal.worker_messages import LogitBias, NewRow, RowSampling, StepPlan
from mgpu.worker.errors import BadPlan
from mgpu.worker.sampling import grammar_masks, grammar_state
from mgpu.worker.sampling.grammar_masks import MaskMaker
from mgpu.worker.sampling.sampler import Sampler
from mgpu.worker.state.rows import RowTable


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MIXED = [
    of("/[ab]{4}/"),
    RowSampling(),
    of('"x" ("y" | "z")', temperature=1.0, seed=7),
    of('%json {"type": "boolean"}', temperature=0.7, top_p=0.9, seed=3, num_logprobs=1),
    RowSampling(temperature=1.0, top_k=5, seed=9),
    of("/[a-c]+d/", repetition_penalty=1.3, logit_bias=LogitBias.of([(ord("d"), 5.0)])),
]


def text_of(tokens: list[int]) -> bytes:
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    return b"".join(TOKENS[token] for token in tokens[:end])


def test_rows_choose_what_their_grammars_allow_and_stop_where_the_text_is_complete() -> None:
    tokens, failures = answers(MIXED, 12)
    first, third, fourth, last = (text_of(tokens[row]) for row in (0, 2, 3, 5))
    assert len(first) == 4
    assert set(first) <= set(b"ab")
    assert third in (b"xy", b"xz")
    assert fourth in (b"true", b"false")
    assert last.endswith(b"d")
    assert all(EOS in tokens[row] for row in (0, 2, 3, 5))
    assert failures == []


def test_rows_without_a_grammar_choose_as_they_do_alone() -> None:
    plain = [RowSampling()] * 6
    assert answers(MIXED, 6)[0][1] == answers(plain, 6)[0][1]


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_choose_the_same(ranks: int) -> None:
    assert answers(MIXED, 8, ranks=ranks) == answers(MIXED, 8)


@pytest.mark.parametrize("done", [1, 3, 6])
def test_a_row_that_comes_again_goes_on_as_it_would_have(done: int) -> None:
    whole, _ = answers(MIXED, 10)
    assert answers(MIXED, 10, tuple(each[:done] for each in whole))[0] == whole


def test_a_token_after_the_end_is_no_failure() -> None:
    tokens, failures = answers([of('"a"')], 5)
    assert tokens[0][1:] == [EOS] * 4
    assert failures == []


def test_any_stop_token_ends_a_complete_text_and_none_an_incomplete_one() -> None:
    newline = TOKENS.index(b"\n")  # the grammar means its text, but it was asked for as a stop token
    tokens, _ = answers([of("/[a\\n]{2,3}/", (newline,), logit_bias=LogitBias.of([(newline, 90.0)]))], 3)
    assert text_of(tokens[0]) == b"aa\n"


def test_a_grammar_that_no_token_continues_is_reported() -> None:
    tokens, failures = answers([RowSampling(), of('"a" <|gone|>')], 1)
    assert failures[0][0] == 1
    assert "cannot go on" in failures[0][1]
    assert tokens[1] == [EOS]


def maker() -> MaskMaker:
    import llguidance

    return MaskMaker(llguidance.LLExecutor(num_threads=2), len(TOKENS))


def test_rows_of_a_step_are_brought_forward_together() -> None:
    states = states_of("/a[b-c]+/", '"x"', '"ab" /[^a]/', '"a" <|gone|>')
    first = maker().masks(states)
    ab = TOKENS.index(b"ab")
    assert [allowed(words_W) for words_W in first] == [{ord("a"), ab}, {ord("x")}, {ord("a"), ab}, {EOS}]
    second = maker().advance(states, [ord("a"), ord("x"), ab, ord("a")])
    assert [allowed(words_W) for words_W in second[:2]] == [{ord("b"), ord("c")}, {EOS}]
    assert allowed(second[2]).isdisjoint({ord("a"), ab, EOS})
    assert allowed(second[3]) == {EOS}
    assert [bool(state.failure) for state in states] == [False, False, False, True]


@pytest.mark.parametrize("tokens", [[], [ord("a")]])
def test_slow_masks_are_reported_and_are_the_same_masks(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    [quick], [slow] = states_of("/a[b-c]+/"), states_of("/a[b-c]+/")
    expected = [maker().masks([quick]), *(maker().advance([quick], [token]) for token in tokens)]
    monkeypatch.setattr(grammar_state, "MAX_AHEAD_S", -1.0)
    found = [maker().masks([slow]), *(maker().advance([slow], [token]) for token in tokens)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not quick.failure
    assert "its tokens have taken -1 s more than 0.005 s each" in slow.failure


def test_a_slow_row_among_others_is_found_at_its_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    states = states_of("/a[b-c]+/", "/a[b-d]+/")
    maker().masks(states)
    monkeypatch.setattr(grammar_masks, "SLOW_STEP_S", -1.0)
    monkeypatch.setattr(grammar_state, "MAX_AHEAD_S", -1.0)
    maker().advance(states, [ord("a"), ord("a")])
    assert not any(state.failure for state in states)
    maker().advance(states, [ord("b"), ord("b")])
    assert all("s for a token" in state.failure for state in states)


def test_a_row_with_a_grammar_needs_the_vocabulary() -> None:
    sampler = Sampler(RowTable(8, 64, 16, 8, CPU), run_ranks(1, lambda group: group)[0], PADDED)
    new = NewRow(0, struct.pack("<i", 1), 1, [0], of('"a"'))
    with pytest.raises(BadPlan, match="vocabulary has not come"):
        sampler.grammars.follow(StepPlan(1, 1, [], [new], [], [], [], [], [], []))
