"""A bounded reasoning: what a worker lets a model choose, token by token."""

import pytest

pytest.importorskip("llguidance", reason="needs mgpu[serve]")

from harness.answers.grammar_follower import GrammarFollower
from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError, checked_grammar
from mgpu.orchestrator.gateway.text.grammars.thinking_limit import ThinkingLimit, grammar_with_reasoning
from mgpu.protocol.front.fields import INT32_MAX
from mgpu.protocol.internal.worker_messages import Vocabulary

MARKERS = ["<think>", "</think>", "[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|end|>", "<eos>", "<call>"]
BEGIN, END, M_BEGIN, M_END, CHANNEL, MESSAGE, H_END, EOS, CALL = range(256, 256 + len(MARKERS))
VOCABULARY = Vocabulary(0, [*(bytes([each]) for each in range(256)), *(name.encode() for name in MARKERS)], [EOS, CALL])
ALL = set(range(len(VOCABULARY.tokens)))


def encode(text: str) -> list[int]:
    return [256 + MARKERS.index(text)] if text in MARKERS else list(text.encode())


def follow(limit: ThinkingLimit, is_open: bool, form: str = "") -> GrammarFollower:
    return GrammarFollower(grammar_with_reasoning(limit, is_open, form, encode), VOCABULARY, [EOS])


@pytest.mark.parametrize(("name", "begin", "end"), [("think", BEGIN, END), ("mistral", M_BEGIN, M_END)])
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_reasoning_ends_after_its_last_token(name: str, begin: int, end: int, is_open: bool, most: int) -> None:
    answer = follow(ThinkingLimit(most, name), is_open)
    if not is_open:
        answer.take([10, begin])
    for _ in range(most):
        assert answer.allowed() == ALL - {EOS}
        answer.take([CALL])
    assert answer.allowed() == {end}
    answer.take([end])
    assert answer.allowed() == ALL
    answer.take([10, CALL, end, begin, EOS])


def test_reasoning_may_end_before_and_may_not_begin_late() -> None:
    answer = follow(ThinkingLimit(INT32_MAX, "think"), is_open=True)
    answer.take([65, END, 65, EOS])
    silent = follow(ThinkingLimit(5, "think"), is_open=False)
    silent.take(b"ab")
    assert silent.allowed() == ALL
    silent.take(b"c")
    assert silent.allowed() == ALL - {BEGIN}
    silent.take([CALL, EOS])


@pytest.mark.parametrize("form", [{"regex": "ab*"}, {"choice": ["a", "ab"]}, {"grammar": 'start: "a" "b"?'}])
def test_a_form_comes_after_the_reasoning(form: dict[str, object]) -> None:
    for is_open in (True, False):
        answer = follow(ThinkingLimit(2, "think"), is_open, checked_grammar(form))
        answer.take([] if is_open else [BEGIN])
        answer.take([CALL, 98])
        assert answer.allowed() == {END}
        answer.take([END, 10, ord("a")])
        assert answer.allowed() == {ord("b"), EOS}
    at_once = follow(ThinkingLimit(2, "think"), False, checked_grammar(form))
    at_once.take([ord("a"), ord("b"), EOS])


def test_only_the_channel_of_reasoning_is_bounded() -> None:
    answer = follow(ThinkingLimit(2, "harmony"), is_open=False)
    answer.take([CHANNEL, *b"analysis", MESSAGE, 65, 66])
    assert answer.allowed() == {H_END}
    answer.take([H_END, CALL, *b"assistant", CHANNEL])
    assert answer.allowed() == {ord("f"), ord("c")}
    answer.take([*b"final", MESSAGE, 65, 66, 67, 68, EOS])
    call = follow(ThinkingLimit(0, "harmony"), is_open=False)
    call.take([CHANNEL, *b"commentary to=functions.f", MESSAGE, *b"{}", EOS])
    follow(ThinkingLimit(0, "harmony"), is_open=False).take([*b"plain text", EOS])


def test_what_cannot_be_counted_has_no_grammar_and_a_marker_that_ends_the_answer_is_refused() -> None:
    limit = ThinkingLimit(2, "think")
    assert grammar_with_reasoning(limit, True, "", lambda text: [1, 2]) == ""
    with pytest.raises(GrammarError, match=f"stop_token_ids has {END}, which is </think>"):
        grammar_with_reasoning(ThinkingLimit(2, "think", (7, END)), True, "", encode)
