"""What an owner with many runs already takes turns beside those with few, and no token changes by it."""

import random

import pytest

from harness.scheduler_driver import Harness, prompt_of
from harness.servers.fake_model import solo_tokens
from mgpu.orchestrator.scheduler.resting import TURN_STEPS
from mgpu.orchestrator.scheduler.running_shares import FEW

MANY, ROOM = FEW + 8, 10


def harness_of(stages: int = 1, num_blocks: int = 2000) -> Harness:
    harness = Harness(num_stages=stages, num_blocks=num_blocks, max_rows=64, max_batch_tokens=256, max_seq_len=600)
    harness.scheduler.shares.room_beside = lambda *_: ROOM
    return harness


def run_steps(harness: Harness, count: int) -> list[int]:
    """Run steps and return how many rows each had."""
    until = len(harness.plans) + count
    harness.run(until=lambda: len(harness.plans) >= until)
    return [len(plan.rows) for plan in harness.plans[-count:]]


def test_beside_an_owner_with_few_those_of_one_with_many_take_turns() -> None:
    harness = harness_of()
    for number in range(MANY):
        harness.submit(number, prompt_of(number, 4), 500, account=1)
    assert run_steps(harness, 5)[-1] == MANY
    for number in range(100, 103):
        harness.submit(number, prompt_of(number, 4), 200, account=2)
    assert set(run_steps(harness, 120)[4:]) == {3 + ROOM}
    counts = [len(harness.tokens[number]) for number in range(MANY)]
    assert max(counts) - min(counts) <= TURN_STEPS + 2, "all go on, one as far as the other"


def test_when_the_others_have_ended_all_decode_again() -> None:
    harness = harness_of()
    for number in range(MANY):
        harness.submit(number, prompt_of(number, 4), 500, account=1)
    run_steps(harness, 5)
    harness.submit(100, prompt_of(100, 4), 30, account=2)
    harness.run(until=lambda: 100 in harness.finish)
    assert run_steps(harness, 5)[-1] == MANY


def test_one_owner_alone_never_rests() -> None:
    harness = harness_of()
    for number in range(MANY):
        harness.submit(number, prompt_of(number, 4), 100, account=1)
    assert set(run_steps(harness, 50)[5:]) == {MANY}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_resting_loses_and_changes_no_token(seed: int, stages: int) -> None:
    rng = random.Random(f"{seed}/{stages}")
    harness = harness_of(stages, num_blocks=rng.choice([300, 2000]))
    asked = {number: (prompt_of(number, rng.randrange(1, 24)), rng.randrange(1, 60)) for number in range(100)}
    cancelled = set(rng.sample(range(100), 10))
    for number, (prompt, max_tokens) in asked.items():
        harness.submit(number, prompt, max_tokens, account=1 if number < MANY else rng.choice([1, 1, 1, 2, 3]))
        if number > MANY:
            run_steps(harness, rng.randrange(1, 6))
        for each in cancelled:
            if rng.random() < 0.02 and each not in harness.finish and each < number:
                harness.scheduler.cancel(each, "cancelled")
    harness.run()
    for number, each in asked.items():
        expected = solo_tokens(*each)
        found = harness.tokens.get(number, [])
        assert found == (expected if harness.finish[number] == "length" else expected[: len(found)])
    harness.scheduler.check_integrity()
    assert harness.scheduler.shares.extra_cost == 0
