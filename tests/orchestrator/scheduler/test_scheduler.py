"""The scheduler against a model that notices every mistake in blocks, rows, positions and steps."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.scheduler_driver import Harness, limits, prompt_of
from harness.servers.fake_model import solo_tokens
from mgpu.orchestrator.placement.options import LimitsError
from mgpu.orchestrator.scheduler import block_tables
from mgpu.protocol.internal.gateway_messages import Submit
from mgpu.protocol.internal.worker_messages import RowSampling, StepResult
from mgpu.protocol.model.attention_facts import Sight


@pytest.fixture
def harness() -> Harness:
    return Harness()


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_requests_of_mixed_lengths_equal_their_solo_runs(stages: int) -> None:
    harness = Harness(num_stages=stages, num_blocks=400)
    lengths = [(1, 1), (3, 20), (4, 4), (5, 40), (33, 7), (100, 30), (31, 1), (64, 64), (12, 90), (200, 56), (2, 3)]
    for i, (prompt_len, max_tokens) in enumerate(lengths):
        harness.submit(i, prompt_of(i, prompt_len), max_tokens)
    harness.run()
    for i, (prompt_len, max_tokens) in enumerate(lengths):
        assert harness.tokens[i] == solo_tokens(prompt_of(i, prompt_len), max_tokens)
        assert harness.finish[i] == "length"


def test_stop_token_ends_the_request_and_is_emitted_once() -> None:
    prompt = prompt_of(1, 5)
    stop = solo_tokens(prompt, 10)[6]
    harness = Harness()
    harness.submit(1, prompt, 50, stop_ids=(stop,))
    harness.run()
    assert harness.tokens[1] == solo_tokens(prompt, 50, (stop,))
    assert harness.finish[1] == "stop"
    assert harness.scheduler.counters.discarded_tokens == 1


def test_max_tokens_is_never_planned_past(harness: Harness) -> None:
    harness.submit(1, prompt_of(1, 5), 7)
    harness.run()
    assert sum(sum(plan.samples) for plan in harness.plans) == 7
    assert harness.scheduler.counters.discarded_tokens == 0


def test_next_step_is_published_before_the_tokens_of_the_last_one_arrive(harness: Harness) -> None:
    harness.submit(1, prompt_of(1, 5), 7)
    assert harness.publish()
    assert harness.publish()
    assert not harness.publish(), "two steps are in flight with one stage"


@pytest.mark.parametrize("stages", [2, 4])
def test_rows_spread_over_the_batches_of_a_pipeline(stages: int) -> None:
    harness = Harness(num_stages=stages, max_rows=16, max_batch_tokens=64)
    for i in range(8):
        harness.submit(i, prompt_of(i, 3), 40)
    harness.run(until=lambda: len(harness.plans) > 6 * stages)
    sizes = [len(plan.rows) for plan in harness.plans[-stages:]]
    assert sizes == [8 // stages] * stages
    assert harness.scheduler.num_in_flight in (stages, stages + 1)


def test_prompts_are_prefilled_in_chunks_beside_decoding() -> None:
    harness = Harness(max_batch_tokens=16, num_blocks=100)
    harness.submit(1, prompt_of(1, 4), 30)
    harness.run(until=lambda: len(harness.tokens.get(1, [])) > 2)
    before = len(harness.plans)
    harness.submit(2, prompt_of(2, 100), 3)
    harness.run(until=lambda: 2 in harness.tokens)
    mixed = [plan for plan in harness.plans[before:] if len(plan.rows) == 2]
    assert len(mixed) >= 7
    assert all(sum(plan.counts) <= 16 for plan in mixed)
    harness.run()
    assert harness.tokens[2] == solo_tokens(prompt_of(2, 100), 3)


def test_first_come_first_served_within_a_priority() -> None:
    harness = Harness(max_rows=1)
    for i, priority in enumerate([1, 1, 0, 1, 0]):
        harness.submit(i, prompt_of(i, 3), 2, priority=priority)
    harness.run()
    assert list(harness.finish) == [2, 4, 0, 1, 3]


def test_a_client_with_one_request_does_not_wait_for_the_hundred_of_another() -> None:
    harness = Harness(max_rows=2)
    for i in range(100):
        harness.submit(i, prompt_of(i, 5), 4, account=1)
    harness.run(until=lambda: len(harness.finish) == 10)
    harness.submit(1000, prompt_of(7, 5), 4, account=2)
    harness.run(until=lambda: 1000 in harness.finish)
    assert len(harness.finish) <= 10 + 2 * harness.limits.max_rows + 1
    harness.run()
    assert len(harness.finish) == 101


def test_a_low_priority_number_does_not_pass_the_requests_of_other_clients() -> None:
    harness = Harness(max_rows=1, prefix_cache=False)
    for i in range(3):
        harness.submit(i, prompt_of(i, 5), 4, account=1)
        harness.submit(10 + i, prompt_of(i, 5), 4, account=2, priority=-1000)
    harness.run()
    assert list(harness.finish) == [0, 10, 1, 11, 2, 12]


def test_what_has_begun_is_not_preempted_for_what_comes_later() -> None:
    harness = Harness(num_blocks=12, max_rows=2, prefix_cache=False)
    harness.submit(1, prompt_of(1, 12), 30, account=1, priority=5)
    harness.run(until=lambda: bool(harness.tokens.get(1)))
    harness.submit(2, prompt_of(2, 12), 30, account=2, priority=-5)
    harness.run()
    assert harness.scheduler.counters.preemptions > 0
    assert list(harness.finish) == [1, 2]


def test_requests_that_ran_when_the_workers_died_go_first_in_their_old_order() -> None:
    harness = Harness(max_rows=2, num_blocks=64)
    for i in range(4):
        harness.submit(i, prompt_of(i, 4), 6, account=i % 2, priority=-i)
    harness.run(until=lambda: len(harness.tokens) == 2)
    began = sorted(harness.tokens)
    harness.crash(epoch=1, num_blocks=64)
    harness.submit(9, prompt_of(9, 4), 6, account=7)
    harness.run()
    assert sorted(list(harness.finish)[:2]) == began
    assert all(harness.tokens[i] == solo_tokens(prompt_of(i, 4), 6) for i in range(4))


def test_equal_prompts_reuse_full_blocks_but_compute_the_last_token(harness: Harness) -> None:
    prompt = prompt_of(1, 16)
    harness.submit(1, prompt, 3)
    harness.run()
    computed = harness.model.computed_tokens
    harness.submit(2, prompt, 3)
    harness.run()
    assert harness.cached == {1: 0, 2: 12}
    assert harness.model.computed_tokens - computed == 4 + 2
    assert harness.tokens[2] == harness.tokens[1]


def test_requests_of_one_prompt_at_the_same_time_compute_it_once(harness: Harness) -> None:
    prompt = prompt_of(1, 18)
    for i in range(4):
        harness.submit(i, prompt, 3)
    harness.run()
    assert harness.cached == {0: 0, 1: 16, 2: 16, 3: 16}
    assert harness.model.computed_tokens == 18 + 3 * 2 + 4 * 2
    assert all(harness.tokens[i] == solo_tokens(prompt, 3) for i in range(4))


def test_a_request_that_shares_a_prefix_waits_for_its_blocks_only(harness: Harness) -> None:
    prompt = prompt_of(1, 18)
    harness.submit(1, prompt, 100)
    harness.submit(2, prompt, 2)
    harness.run(until=lambda: 2 in harness.finish)
    assert len(harness.tokens[1]) < 20
    assert 1 not in harness.finish


def test_a_cancelled_prefill_does_not_hold_up_those_that_waited_for_its_blocks() -> None:
    harness = Harness(max_batch_tokens=12)
    prompt = prompt_of(1, 40)
    harness.submit(1, prompt, 3)
    harness.submit(2, prompt, 3)
    harness.publish()
    harness.cancel(1)
    harness.run()
    assert harness.tokens[2] == solo_tokens(prompt, 3)


def test_the_next_turn_of_a_chat_reuses_prompt_and_answer(harness: Harness) -> None:
    prompt = prompt_of(1, 16)
    harness.submit(1, prompt, 9)
    harness.run()
    harness.submit(2, prompt + harness.tokens[1] + prompt_of(2, 3), 3)
    harness.run()
    assert harness.cached[2] == 24


def test_other_salts_do_not_share_blocks(harness: Harness) -> None:
    prompt = prompt_of(1, 16)
    harness.submit(1, prompt, 3, salt=b"a")
    harness.run()
    harness.submit(2, prompt, 3, salt=b"b")
    harness.run()
    assert harness.cached[2] == 0


def test_prefix_cache_can_be_switched_off() -> None:
    harness = Harness(prefix_cache=False)
    for i in range(2):
        harness.submit(i, prompt_of(1, 16), 3)
        harness.run()
    assert harness.cached[1] == 0


def test_running_out_of_blocks_preempts_the_youngest_and_changes_no_token() -> None:
    harness = Harness(num_blocks=12)
    for i in range(4):
        harness.submit(i, prompt_of(i, 6), 30)
    harness.run()
    assert harness.scheduler.counters.preemptions > 0
    assert all(harness.tokens[i] == solo_tokens(prompt_of(i, 6), 30) for i in range(4))
    assert next(iter(harness.finish)) == 0, "the oldest always progresses"


def test_a_request_as_large_as_the_pool_runs() -> None:
    harness = Harness(num_blocks=4)
    harness.submit(1, prompt_of(1, 10), 7)
    harness.submit(2, prompt_of(2, 10), 7)
    harness.run()
    assert harness.tokens == {i: solo_tokens(prompt_of(i, 10), 7) for i in (1, 2)}


def test_requests_that_never_fit_are_refused_with_the_numbers() -> None:
    harness = Harness(num_blocks=16, max_seq_len=50)
    harness.submit(1, prompt_of(1, 40), 11)
    assert "40 tokens + max_tokens 11 = 51 exceeds the context of 50 tokens; ask for at most 10" in harness.errors[1]
    harness = Harness(num_blocks=4, max_seq_len=50)
    harness.submit(1, prompt_of(1, 17), 1)
    assert "exceeds the KV cache of 16 tokens (4 blocks of 4); shorten the prompt to at most 16" in harness.errors[1]


@pytest.mark.parametrize("data", [b"", b"123"])
def test_prompts_that_are_not_token_ids_are_refused(harness: Harness, data: bytes) -> None:
    harness.scheduler.submit(Submit(1, data, 1, [], RowSampling(), b"", 0))
    harness.collect()
    assert harness.finish == {1: "error"}


def test_ids_outside_the_vocabulary_are_refused() -> None:
    harness = Harness(vocab_size=1000)
    harness.submit(1, [3, 1000], 1)
    harness.submit(2, [-1], 1)
    assert harness.errors[1] == harness.errors[2] == "token ids must be between 0 and 999"


@pytest.mark.parametrize(("prompt_len", "advice"), [
    (254, "ask for at most 2 tokens"), (255, "ask for at most 1 tokens"),
    (256, "shorten the prompt to at most 255 tokens"),
])  # fmt: skip
def test_a_request_that_is_too_long_is_told_what_would_fit(harness: Harness, prompt_len: int, advice: str) -> None:
    harness.submit(1, prompt_of(1, prompt_len), 5)
    assert advice in harness.errors[1]


def test_cancelling_anywhere_frees_everything() -> None:
    harness = Harness(max_rows=2, max_batch_tokens=8)
    harness.submit(1, prompt_of(1, 4), 50)
    harness.run(until=lambda: 1 in harness.tokens)
    harness.submit(2, prompt_of(2, 60), 50)
    harness.publish()
    harness.submit(3, prompt_of(3, 4), 50)
    for sequence_id in (1, 2, 3, 99):
        harness.cancel(sequence_id)
    harness.run()
    assert harness.finish == {1: "cancelled", 2: "cancelled", 3: "cancelled"}


def test_a_row_is_not_reused_while_its_token_is_under_way() -> None:
    harness = Harness(max_rows=1)
    harness.submit(1, prompt_of(1, 4), 50)
    harness.submit(2, prompt_of(2, 4), 50)
    harness.publish()
    harness.cancel(1)
    assert not harness.publish()
    harness.gather()
    assert harness.publish()


def test_a_result_of_another_step_is_an_error_and_of_another_epoch_ignored(harness: Harness) -> None:
    harness.submit(1, prompt_of(1, 4), 5)
    harness.publish()
    harness.scheduler.apply(StepResult(7, 0, [1], None, 0))
    with pytest.raises(ValueError, match="step 5 does not fit"):
        harness.scheduler.apply(StepResult(0, 5, [1], None, 0))


def test_a_sequence_whose_grammar_cannot_go_on_ends_with_the_reason_and_the_others_go_on(harness: Harness) -> None:
    for sequence_id in (1, 2):
        harness.submit(sequence_id, prompt_of(sequence_id, 4), 6)
    harness.publish()
    harness.results.append(replace(harness.results.pop(), failures=[(0, "no token continues the text")]))
    harness.run()
    assert (harness.finish[1], harness.errors[1], harness.tokens[1]) == ("error", "no token continues the text", [])
    assert harness.tokens[2] == solo_tokens(prompt_of(2, 4), 6)


def test_a_late_result_of_dead_workers_becomes_no_token(harness: Harness) -> None:
    prompt = prompt_of(1, 4)
    harness.submit(1, prompt, 6)
    harness.run(until=lambda: len(harness.tokens.get(1, [])) == 2)
    harness.crash(epoch=1, num_blocks=64)
    assert harness.publish()
    step = harness.plans[-1].step
    harness.scheduler.apply(StepResult(0, step, [999], None, 0))  # as if both epochs had a step of this number
    harness.run()
    assert harness.tokens[1] == solo_tokens(prompt, 6)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_crashes_at_any_moment_lose_and_repeat_nothing(stages: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.orchestrator.scheduler.crash_suspects.FATAL_CRASHES", 100)
    rng = random.Random(seed)
    harness = Harness(num_stages=stages, num_blocks=60)
    shapes = {i: (rng.randrange(1, 60), rng.randrange(1, 60)) for i in range(20)}
    for i, (prompt_len, max_tokens) in shapes.items():
        harness.submit(i, prompt_of(i, prompt_len), max_tokens)
    for epoch in range(1, 12):
        for _ in range(rng.randrange(0, 30)):
            rng.choice([harness.publish, harness.publish, harness.gather])()
        harness.crash(epoch, 60)
        harness.scheduler.check_integrity()
    harness.run()
    for i, (prompt_len, max_tokens) in shapes.items():
        assert harness.tokens[i] == solo_tokens(prompt_of(i, prompt_len), max_tokens)
    assert set(harness.finish.values()) == {"length"}


def test_a_request_that_waited_during_a_crash_is_innocent_of_it() -> None:
    harness = Harness(max_rows=1)
    for i in (1, 2):
        harness.submit(i, prompt_of(i, 5), 10)
    harness.publish()
    harness.crash(1, 64)
    harness.publish()
    assert harness.prefilled_again == 1
    harness.crash(2, 64)  # 1 ran both times, 2 never
    assert harness.prefilled_again == 0
    assert harness.finish == {1: "error"}
    assert "failed 2 times in a row while they ran this request: boom" in harness.errors[1]
    harness.publish()
    harness.crash(3, 64)
    harness.run()
    assert harness.tokens[2] == solo_tokens(prompt_of(2, 5), 10)
    assert harness.scheduler.counters.replays == 2


@pytest.mark.parametrize(("stages", "begun"), [(1, 0), (1, 3), (2, 3)])
def test_of_many_suspects_only_the_one_that_crashes_alone_is_failed(stages: int, begun: int) -> None:
    """``begun``: how many tokens the culprit gets before the workers die of it."""
    harness = Harness(num_stages=stages)
    culprit, crashes = 3, 0
    for i in range(8):
        harness.submit(i, prompt_of(i, 5 + i), 30)
    while culprit not in harness.finish:
        seq = harness.scheduler.find(culprit)
        if seq is not None and harness.publish() and seq.row in harness.plans[-1].rows:
            if len(seq.tokens) - seq.prompt_len >= begun:
                crashes += 1
                harness.crash(crashes, 64)
        else:
            harness.gather()
    harness.run()
    assert crashes == 3
    assert harness.finish.pop(culprit) == "error"
    assert "failed 3 times in a row" in harness.errors[culprit]
    assert set(harness.finish.values()) == {"length"}
    assert all(harness.tokens[i] == solo_tokens(prompt_of(i, 5 + i), 30) for i in harness.finish)


def test_crashes_that_no_request_brings_about_cost_no_request(harness: Harness) -> None:
    for i in range(8):
        harness.submit(i, prompt_of(i, 5), 30)
    for epoch in (1, 2):
        harness.run(until=lambda epoch=epoch: len(harness.tokens.get(7, [])) > 2 * epoch)  # type: ignore[misc]
        harness.crash(epoch, 64)
    harness.submit(8, prompt_of(8, 5), 30)
    harness.publish()
    assert harness.scheduler.num_running == 1
    harness.cancel(0)  # while it runs alone
    harness.run()
    assert [harness.finish.pop(0), *set(harness.finish.values())] == ["cancelled", "length"]
    assert all(harness.tokens[i] == solo_tokens(prompt_of(i, 5), 30) for i in harness.finish)


def test_a_pool_that_was_smaller_for_a_while_has_its_old_context_again(harness: Harness) -> None:
    harness.crash(1, 10)
    assert harness.scheduler.limits.max_seq_len == 40
    harness.crash(2, 64)
    assert harness.scheduler.limits == limits()
    harness.submit(1, prompt_of(1, 60), 20)
    harness.run()
    assert harness.tokens[1] == solo_tokens(prompt_of(1, 60), 20)


def test_of_a_smaller_pool_a_request_may_use_the_last_token(harness: Harness) -> None:
    harness.submit(1, prompt_of(1, 30), 11)
    harness.submit(2, prompt_of(2, 30), 12)
    harness.crash(1, 10)
    assert harness.errors == {2: "after a restart the KV cache holds only 40 tokens, this needs 41"}
    harness.run()
    assert harness.tokens[1] == solo_tokens(prompt_of(1, 30), 11)


def test_batch_budget_must_exceed_rows() -> None:
    with pytest.raises(LimitsError, match="max_batch_tokens 8 must exceed max_rows 8"):
        limits(max_batch_tokens=8)


@pytest.mark.parametrize("num_emitted", [1, 4, 7])
def test_an_answer_that_another_server_began_goes_on_as_it_would_have(num_emitted: int) -> None:
    whole, harness = solo_tokens([1, 2, 3], 8, ()), Harness()
    harness.submit(1, [1, 2, 3], 8, emitted=tuple(whole[:num_emitted]))
    harness.run()
    assert (harness.tokens[1], harness.finish[1]) == (whole[num_emitted:], "length")
    harness.submit(2, [1, 2, 3], 8, emitted=tuple(whole[:num_emitted]))
    harness.run()
    assert harness.cached[2] <= 3, "what was emitted is no prompt"


request_shapes = st.tuples(
    st.integers(0, 3),  # prompts of one group share a prefix
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(0, 1),  # priority, and which client it is
    st.sampled_from([(), (7,), tuple(range(0, 1000, 13))]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(request_shapes, min_size=1, max_size=14),
    stages=st.integers(1, 3),
    num_blocks=st.integers(17, 40),
    max_rows=st.integers(1, 6),
    budget=st.integers(1, 20),
    snapshots=st.sampled_from([0, 1, 2, 5, 40]),
    pages=st.sampled_from([0, 0, 5, 7, 16]),
    entry=st.sampled_from([4, 1024]),
    sight=st.sampled_from([(1, False), (5, False), (8, False), (16, False), (8, True), (10, True)]),
    seed=st.integers(0, 2**32),
)
def test_any_schedule_gives_solo_tokens_and_returns_every_block(
    monkeypatch: pytest.MonkeyPatch,
    shapes: list[tuple[int, int, int, int, tuple[int, ...]]],
    stages: int,
    num_blocks: int,
    max_rows: int,
    budget: int,
    snapshots: int,
    pages: int,
    entry: int,
    sight: Sight,
    seed: int,
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(block_tables, "ENTRY_TOKENS", entry)
    harness = Harness(
        num_stages=stages, num_blocks=num_blocks, max_rows=max_rows, max_batch_tokens=max_rows + budget,
        max_seq_len=64, num_snapshots=0 if pages else snapshots, num_pages=pages, sight=sight,
    )  # fmt: skip
    cancelled: set[int] = set()
    pending = list(enumerate(shapes))
    while pending or harness.scheduler.num_live:
        match rng.randrange(8):
            case 0 if pending:
                sequence_id, (group, prompt_len, max_tokens, priority, stops) = pending.pop(0)
                harness.submit(sequence_id, prompt_of(group, prompt_len), max_tokens, stop_ids=stops, priority=priority)
            case 1 if rng.randrange(4) == 0:
                victim = rng.randrange(len(shapes))
                if victim in harness.scheduler._live:
                    cancelled.add(victim)
                    harness.cancel(victim)
            case 2 | 3 | 4:
                harness.publish()
            case _:
                if not harness.gather() and not pending:
                    assert harness.publish() or not harness.scheduler.num_live, "stuck"
        harness.scheduler.check_integrity()
    harness.run()
    assert len(harness.finish) == len(shapes), "every request ends exactly once"
    for sequence_id, (group, prompt_len, max_tokens, _, stops) in enumerate(shapes):
        solo = solo_tokens(prompt_of(group, prompt_len), max_tokens, stops)
        if sequence_id in cancelled:
            assert harness.finish[sequence_id] == "cancelled"
            assert harness.tokens[sequence_id] == solo[: len(harness.tokens[sequence_id])]
        else:
            assert harness.tokens[sequence_id] == solo
            assert harness.finish[sequence_id] == ("stop" if solo[-1] in stops else "length")
