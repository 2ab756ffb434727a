"""Prompts of models with linear layers that begin alike start from a copied state."""

import pytest

from harness.scheduler_driver import Harness, prompt_of
from harness.servers.fake_model import solo_tokens
from mgpu.orchestrator.scheduler import snapshots


def harness_of(num_snapshots: int = 16, **changes: int | bool) -> Harness:
    return Harness(num_snapshots=num_snapshots, num_blocks=256, max_seq_len=1024, **changes)


def test_a_chat_of_20_turns_computes_less_than_a_tenth_of_its_tokens_again() -> None:
    harness, history, computed, seen = harness_of(), prompt_of(0, 30), 0, 0
    for turn in range(20):
        if turn:
            history = history + prompt_of(turn, 9)
        before = harness.model.computed_tokens
        answer = harness.answer(turn, history, 21)
        computed += harness.model.computed_tokens - before
        seen += len(history) + len(answer)
        history = history + answer
    # What is new must be computed; of the rest less than a tenth.
    assert computed - len(history) < 0.1 * (seen - len(history))
    assert computed - len(history) <= 19 * (4 + 1)  # a turn begins at the last block's end, or one token before


def test_the_same_prompt_starts_from_its_last_full_block() -> None:
    harness = harness_of()
    harness.answer(0, prompt_of(1, 22))
    harness.answer(1, prompt_of(1, 22))
    assert harness.cached == {0: 0, 1: 20}


def test_choices_of_one_prompt_compute_it_once_and_go_apart() -> None:
    harness_of().answer_choices()


def test_what_two_prompts_share_is_kept_from_the_second_on() -> None:
    harness, system = harness_of(), prompt_of(1, 41)
    for question in range(4):
        harness.answer(question, system + prompt_of(50 + question, 11))
    assert harness.cached == {0: 0, 1: 0, 2: 40, 3: 40}


def test_long_prompts_are_kept_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "INTERVAL", 4)
    harness = harness_of()
    harness.answer(0, prompt_of(1, 60))
    harness.answer(1, prompt_of(1, 50) + prompt_of(2, 10))
    assert harness.cached[1] == 48


def test_preempted_sequences_compute_their_states_again() -> None:
    harness = Harness(num_snapshots=8, num_blocks=12, max_rows=2, max_seq_len=48)
    for sequence_id in range(2):
        harness.submit(sequence_id, prompt_of(sequence_id, 12), 30)
    harness.run()
    assert harness.scheduler.counters.preemptions > 0
    assert all(harness.tokens[each] == solo_tokens(prompt_of(each, 12), 30) for each in range(2))


def test_the_state_that_was_not_used_for_longest_gives_its_place() -> None:
    harness = harness_of(num_snapshots=2)
    harness.answer(0, prompt_of(0, 10), 1)
    harness.answer(1, prompt_of(1, 10), 1)
    harness.answer(2, prompt_of(0, 10), 1)
    harness.answer(3, prompt_of(3, 10), 1)
    harness.answer(4, prompt_of(0, 10), 1)
    harness.answer(5, prompt_of(1, 10), 1)
    assert harness.cached == {0: 0, 1: 0, 2: 8, 3: 0, 4: 8, 5: 0}


def test_another_salt_finds_no_state() -> None:
    harness = harness_of()
    harness.answer(0, prompt_of(1, 22))
    harness.submit(1, prompt_of(1, 22), 4, salt=b"other")
    harness.run()
    assert harness.cached[1] == 0
