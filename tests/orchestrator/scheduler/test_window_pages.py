"""Sequences of models with windows keep pages of what they see, and find them again."""

import pytest

from harness.scheduler_driver import Harness, prompt_of, submit_of
from harness.servers.fake_model import solo_tokens
from mgpu.orchestrator.engine.stats import EngineStats
from mgpu.orchestrator.scheduler import block_tables
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.orchestrator.scheduler.window_pages import WindowPages


def harness_of(num_pages: int = 16, window: int = 8, in_chunks: bool = False, **changes: int | bool) -> Harness:
    return Harness(num_pages=num_pages, sight=(window, in_chunks), num_blocks=256, max_seq_len=1024, **changes)


def most_held(harness: Harness, prompt: list[int], max_tokens: int) -> int:
    """Return the most pages that one request holds while it decodes."""
    held = []

    def look() -> bool:
        planner = harness.scheduler._planner
        held.extend(len(seq.sight) for seq in planner.admitted.values() if seq.batch >= 0)
        return False

    harness.submit(0, prompt, max_tokens)
    harness.run(look)
    return max(held)


@pytest.mark.parametrize(("window", "in_chunks", "most"), [(8, False, 3), (6, False, 3), (1, False, 1), (8, True, 2)])
def test_a_request_of_any_length_holds_what_its_window_shows(window: int, in_chunks: bool, most: int) -> None:
    assert most_held(harness_of(5, window, in_chunks), prompt_of(1, 50), 100) == most


def test_a_prompt_runs_in_steps_for_which_there_are_pages() -> None:
    harness = harness_of(num_pages=5)
    harness.answer(0, prompt_of(1, 100))
    assert {sum(plan.counts) for plan in harness.plans if plan.starts and plan.starts[0] < 96} == {20, 12, 8}


def test_the_next_turn_of_a_chat_goes_on_after_the_last_block() -> None:
    harness = harness_of()
    history = prompt_of(1, 50)
    history = history + harness.answer(0, history, 30)
    harness.answer(1, history + prompt_of(2, 10))
    assert harness.cached[1] == 76, "of 79 tokens that were computed"


def test_choices_of_one_prompt_compute_it_once_and_go_apart() -> None:
    harness_of().answer_choices()


def test_a_prefix_whose_pages_others_took_is_computed_again_and_then_found() -> None:
    harness = harness_of(num_pages=6)
    harness.answer(0, prompt_of(1, 40))
    harness.answer(1, prompt_of(2, 60))
    harness.answer(2, prompt_of(1, 40))
    harness.answer(3, prompt_of(1, 40))
    assert harness.cached == {0: 0, 1: 0, 2: 0, 3: 36}


def test_a_prefix_is_used_up_to_where_its_window_is_whole() -> None:
    pages = WindowPages(num_blocks=8, num_pages=8, block_size=4, sight=(8, False))
    for block in (0, 1, 2, 4, 5):
        pages.grant(block)
    assert pages.reusable([0, 1, 2]) == 3
    assert pages.reusable([0, 1, 2, 3, 4]) == 3
    assert pages.reusable([0, 1, 2, 3, 4, 5]) == 6, "7 tokens are in sight after it"
    assert pages.reusable([3, 7]) == 0
    assert WindowPages(8, 8, 4, (8, True)).reusable([3, 7]) == 2, "a new chunk sees nothing"


def test_running_out_of_pages_preempts_the_youngest_and_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_tables, "ENTRY_TOKENS", 0)
    harness = harness_of(num_pages=8)
    for sequence_id in range(4):
        harness.submit(sequence_id, prompt_of(sequence_id, 3), 40)
    harness.run()
    assert harness.scheduler.counters.preemptions > 0
    assert all(harness.tokens[each] == solo_tokens(prompt_of(each, 3), 40) for each in range(4))


def test_prompts_that_take_each_others_pages_end_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_tables, "ENTRY_TOKENS", 0)
    harness = harness_of(num_pages=6, window=16, max_batch_tokens=10)
    for sequence_id in range(3):
        harness.submit(sequence_id, prompt_of(sequence_id, 60), 1)
    harness.run()
    assert all(harness.tokens[each] == solo_tokens(prompt_of(each, 60), 1) for each in range(3))


def test_room_is_left_and_made_in_both_pools() -> None:
    pages = WindowPages(num_blocks=100, num_pages=10, block_size=4, sight=(8, False))
    tables = block_tables.BlockTables(100, 4, prefix_cache=True, pages=pages)
    first, second = (Sequence.from_submit(submit_of(each, [each] * 12, 2), each, 14) for each in range(2))
    assert tables.has_room(12, reserve=7)
    assert not tables.has_room(12, reserve=8)
    assert not tables.take(first, 0, spare=0.8)
    assert tables.take(first, 2, spare=0.5), "half of ten pages stay, not half of a hundred"
    assert not tables.take(second, 2, spare=0.6)


def test_counters_say_what_is_held_of_both_pools() -> None:
    harness = harness_of()
    harness.submit(0, prompt_of(0, 30), 20)
    harness.run(lambda: harness.scheduler.counters.steps > 8)
    counters = EngineStats().counters(harness.scheduler, 0.0)
    assert (counters["window_pages_used"], counters["window_pages_total"]) == (3, 16)
    assert counters["kv_blocks_used"] == 10, "of 38 tokens"


def test_new_workers_may_have_fewer_pages() -> None:
    harness = harness_of()
    harness.submit(0, prompt_of(0, 30), 20)
    harness.run(lambda: harness.scheduler.counters.steps > 8)
    harness.crash(1, 256, num_pages=5)
    harness.run()
    assert harness.tokens[0] == solo_tokens(prompt_of(0, 30), 20)
    assert harness.scheduler.limits.num_pages == 5
