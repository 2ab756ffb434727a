"""What owners run beside each other: nobody's streams become much slower by what another has computed."""

import random
from array import array
from dataclasses import replace

import pytest

from harness.scheduler_driver import Harness, prompt_of
from harness.servers.fake_model import FakeModel, solo_tokens
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.scheduler.running_shares import (
    BESIDE_FEW,
    FEW,
    KEPT_STEPS,
    LEAST_AT_ONCE,
    LEAST_PART,
    RECENT_STEPS,
)
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.orchestrator.scheduler.sequence import token_cost_of
from mgpu.protocol.internal.gateway_messages import Submit
from mgpu.protocol.internal.worker_messages import LogitBias, RowGrammar, RowSampling, StepPlan, StepResult
from mgpu.protocol.model.kv_pools import PoolSize

HONEST, OTHER = 1, 2
LIMITS = Limits(num_blocks=4096, block_size=4, max_rows=64, max_batch_tokens=512, max_seq_len=1024)
COSTLY = RowSampling(temperature=1.0, top_p=0.5, num_logprobs=20, logit_bias=LogitBias.of([(1, 1.0)]))


class Server:
    """A scheduler whose steps take a time by their tokens, and a model that computes them."""

    def __init__(self, room: int, limits: Limits = LIMITS) -> None:
        self.scheduler = Scheduler(limits)
        self.scheduler.shares.room_beside = self.scheduler.shares.prompt_room_beside = lambda *_: room
        self.model = FakeModel(limits.num_blocks, limits.block_size, 1)
        self.owner_of: dict[int, int] = {}
        self.rows: dict[int, int] = {}
        self.ended: list[int] = []

    def submit(self, owner: int, prompt: int = 4, max_tokens: int = 400, sampling: RowSampling | None = None) -> int:
        number = len(self.owner_of)
        self.owner_of[number] = owner
        ids = array("i", [number % 50 + 1, *random.Random(number).choices(range(1, 90), k=prompt - 1)]).tobytes()
        row = sampling or RowSampling()
        self.scheduler.submit(Submit(number, ids, max_tokens, [], row, b"", 0, [owner, number], [1.0, 1.0]))
        return number

    def step(self) -> dict[int, int]:
        """Run a step; return the tokens that it computed for each owner."""
        plan = self.scheduler.schedule()
        if plan is None:
            return {}
        occupants = {seq.row: seq.account[0] for seq in self.scheduler._planner.admitted.values()}
        tokens: dict[int, int] = {}
        for row, count in zip(plan.rows, plan.counts, strict=True):
            tokens[occupants[row]] = tokens.get(occupants[row], 0) + count
        self._apply(plan)
        return tokens

    def _apply(self, plan: StepPlan) -> None:
        self.scheduler.apply(StepResult(plan.epoch, plan.step, self.model.execute(plan), None, 0))
        outputs = self.scheduler.take_outputs()
        if outputs is not None:
            self.ended += [each for each, why in zip(outputs.sequence_ids, outputs.finish, strict=True) if why]

    def running(self, owner: int) -> int:
        return sum(seq.account[0] == owner for seq in self.scheduler._planner.admitted.values())


def test_the_prompts_of_another_owner_are_computed_in_portions_beside_streams() -> None:
    server = Server(room=16)
    for _ in range(8):
        server.submit(HONEST)
    server.step()
    for _ in range(50):
        server.submit(OTHER, prompt=300, max_tokens=1)
    steps = [server.step() for _ in range(100)]
    assert all(step[HONEST] == 8 for step in steps), "streams decode in every step"
    assert sum(step.get(OTHER, 0) for step in steps) <= (100 + KEPT_STEPS + 1) * 16
    assert all(step.get(OTHER, 0) >= 16 for step in steps), "the room beside them is used"


def test_a_short_prompt_is_computed_at_once() -> None:
    server = Server(room=16)
    for _ in range(8):
        server.submit(HONEST)
    server.step()
    server.submit(OTHER, prompt=100)
    assert server.step() == {HONEST: 8, OTHER: 100}


def test_prompts_of_a_decoding_owner_do_not_wait_for_prompts_of_another() -> None:
    server = Server(room=2)
    for _ in range(8):
        server.submit(HONEST)
    server.step()
    for _ in range(50):
        server.submit(OTHER, prompt=300, max_tokens=1)
    for _ in range(KEPT_STEPS):
        server.step()
    server.submit(HONEST, prompt=100)
    assert max(server.step().get(HONEST, 0) for _ in range(3)) >= 100


@pytest.mark.parametrize(("sampling", "most"), [(None, 16), (COSTLY, 3)])
def test_sequences_of_another_owner_run_as_far_as_there_is_room(sampling: RowSampling | None, most: int) -> None:
    """What is costly to choose counts for more."""
    server = Server(room=16)
    for _ in range(8):
        server.submit(HONEST)
    server.step()
    for _ in range(40):
        server.submit(OTHER, sampling=sampling)
    for _ in range(20):
        server.step()
    assert server.running(OTHER) == most
    server.submit(HONEST)
    server.step()
    assert server.running(HONEST) == 9, "a held owner does not stand in the way of others"


@pytest.mark.parametrize("others", [FEW - 2, FEW + 8])
def test_an_owner_may_run_what_the_smallest_of_the_others_runs(others: int) -> None:
    """If both have few sequences, or both have more."""
    server = Server(room=1)
    for _ in range(others):
        server.submit(HONEST)
    server.step()
    for _ in range(others):
        server.submit(OTHER)
    for _ in range(150):
        server.step()
    assert server.running(OTHER) == min(others, LIMITS.max_rows - others)


def test_a_long_line_fills_no_half_of_a_step_beside_an_owner_with_few() -> None:
    asked: list[tuple[int, float]] = []

    def room(num_tokens: int, slower: float) -> int:
        asked.append((num_tokens, slower))
        return 4

    server = Server(room=4)
    server.scheduler.shares.room_beside = room
    for _ in range(15):
        server.submit(HONEST)
    server.step()
    for owner in (OTHER, OTHER + 1):
        for _ in range(FEW + 1):
            server.submit(owner)
    for _ in range(150):
        server.step()
    assert [server.running(owner) for owner in (OTHER, OTHER + 1)] == [15 // LEAST_PART] * 2
    assert (15, BESIDE_FEW[0]) in asked, "the room is that beside those with few"
    server.submit(HONEST)
    server.step()
    assert server.running(HONEST) == 16, "long lines do not hold back those with few"


@pytest.mark.parametrize("first", [HONEST, OTHER])
def test_who_floods_the_gateway_has_no_equal_share_of_the_steps(first: int) -> None:
    """Twenty requests of a flood had half of each step, and the streams beside them waited for each other."""
    server = Server(room=1)
    server.scheduler.shares.floods = frozenset({OTHER})
    for owner in (first, HONEST + OTHER - first):
        for _ in range(20):
            server.submit(owner)
        server.step()
    for _ in range(20):
        server.step()
    last = server.step()
    assert last[HONEST] == server.running(HONEST) == 20
    assert last[OTHER] <= LEAST_AT_ONCE
    server.scheduler.shares.floods = frozenset()
    for _ in range(40):
        server.step()
    assert server.step()[OTHER] == server.running(OTHER) == 20


def test_an_owner_alone_has_no_bound_and_others_find_none_when_it_has_gone() -> None:
    server = Server(room=2)
    numbers = [server.submit(HONEST, prompt=100) for _ in range(5)]
    assert server.step() == {HONEST: 500}
    for _ in range(30):
        server.submit(OTHER, prompt=25)
    server.step()
    assert server.running(OTHER) < 30
    for number in numbers:
        server.scheduler.cancel(number, "cancelled")
    for _ in range(RECENT_STEPS + 2):
        server.step()
    assert server.running(OTHER) == 30


def test_an_owner_between_two_requests_is_not_forgotten() -> None:
    server = Server(room=2)
    first = server.submit(HONEST)
    for _ in range(2 * FEW):
        server.submit(OTHER)
    server.step()
    server.scheduler.cancel(first, "cancelled")
    server.step()
    assert server.running(OTHER) == 2


def test_two_short_requests_do_not_hold_back_sixteen_streams() -> None:
    server = Server(room=1)
    for _ in range(2):
        server.submit(OTHER)
    server.step()
    for _ in range(16):
        server.submit(HONEST)
    for _ in range(30):
        server.step()
    assert server.running(HONEST) == 16


def test_a_row_in_line_fills_no_small_step() -> None:
    server = Server(room=1)
    for _ in range(2):
        server.submit(HONEST)
    server.step()
    for _ in range(2 * FEW):
        server.submit(OTHER)
    for _ in range(30):
        server.step()
    assert server.running(OTHER) == 1


FEW_ROWS, FEW_BLOCKS = replace(LIMITS, max_rows=16), replace(LIMITS, num_blocks=400)


@pytest.mark.parametrize("limits", [FEW_ROWS, FEW_BLOCKS], ids=["rows", "blocks"])
def test_who_comes_later_waits_for_no_end_of_long_requests(limits: Limits) -> None:
    server = Server(1000, limits)
    for _ in range(40):
        server.submit(OTHER, prompt=40, max_tokens=100)
    for _ in range(5):
        server.step()
    for _ in range(4):
        server.submit(HONEST, max_tokens=30)
    for _ in range(12):
        server.step()
    assert server.running(HONEST) == 4
    assert server.running(OTHER) >= 8
    assert not server.ended
    for _ in range(5000):
        if not server.step():
            break
        server.scheduler.check_integrity()
    assert sorted(server.ended) == list(server.owner_of)


def test_a_row_of_short_requests_preempts_long_ones_once() -> None:
    server = Server(1000, FEW_ROWS)
    for _ in range(40):
        server.submit(OTHER, prompt=40, max_tokens=900)
    for _ in range(5):
        server.step()
    for _ in range(20):
        number = server.submit(HONEST, max_tokens=5)
        while number not in server.ended:
            server.step()
    assert server.scheduler.counters.preemptions == 1, "then a row stays free for the next"


def test_what_grows_preempts_nobody_who_runs_less() -> None:
    server = Server(1000, FEW_BLOCKS)
    for _ in range(10):
        server.submit(OTHER, prompt=100, max_tokens=300)
    for _ in range(3):
        server.step()
    number = server.submit(HONEST, max_tokens=100)
    for _ in range(110):
        server.step()
    assert number in server.ended
    assert server.scheduler.counters.preemptions > 2


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_making_room_changes_no_token(seed: int, stages: int) -> None:
    rng = random.Random(f"{seed}/{stages}")
    harness = Harness(num_stages=stages, num_blocks=rng.choice([30, 60]), max_rows=rng.choice([6, 24]))
    asked = {number: (prompt_of(number, rng.randrange(1, 24)), rng.randrange(1, 40)) for number in range(40)}
    for number, (prompt, max_tokens) in asked.items():
        harness.submit(number, prompt, max_tokens, account=rng.choice([1, 1, 1, 2, 3]))
        num_plans = len(harness.plans) + rng.randrange(4)
        harness.run(until=lambda num_plans=num_plans: len(harness.plans) >= num_plans)
    harness.run()
    assert harness.scheduler.counters.preemptions > 0
    assert harness.tokens == {number: solo_tokens(*each) for number, each in asked.items()}


def test_owners_that_have_gone_are_forgotten_while_others_run() -> None:
    server = Server(room=1000)
    for owner in (HONEST, OTHER):
        server.submit(owner, max_tokens=400)
    for owner in range(100, 200):
        server.submit(owner, max_tokens=2)
        server.step()
    for _ in range(RECENT_STEPS):
        server.step()
    assert set(server.scheduler.shares._kept) == {HONEST, OTHER}


@pytest.mark.parametrize("seed", range(20))
def test_everything_ends_whatever_room_there_is(seed: int) -> None:
    rng = random.Random(seed)
    limits = replace(LIMITS, num_blocks=80, max_rows=8) if seed % 2 else LIMITS
    server = Server(1, limits)
    shares = server.scheduler.shares
    shares.room_beside = shares.prompt_room_beside = lambda *_: rng.choice([1, 1, 5, 1000])
    for _ in range(300):
        if rng.random() < 0.3:
            server.submit(rng.randrange(4), rng.randrange(1, 200), rng.randrange(1, 8), rng.choice([None, COSTLY]))
        server.step()
        if rng.random() < 0.01:
            server.scheduler.forget_workers("boom")
            server.scheduler.use_workers(server.scheduler._planner.epoch + 1, PoolSize(limits.num_blocks))
            server.model = FakeModel(limits.num_blocks, limits.block_size, 1)
        server.scheduler.check_integrity()
    for _ in range(20_000):
        if not server.step():
            break
    assert sorted(server.ended) == list(server.owner_of)
    shares = server.scheduler.shares
    assert (shares._running, shares.extra_cost) == ({}, 0)


def test_what_is_costly_to_choose_counts_for_more() -> None:
    assert token_cost_of(RowSampling()) == token_cost_of(RowSampling(temperature=1.0, seed=5)) == 1
    assert token_cost_of(RowSampling(num_logprobs=0)) == 2
    assert token_cost_of(RowSampling(repetition_penalty=1.1)) == 2
    assert token_cost_of(RowSampling(grammar=RowGrammar("x", [2]))) == 2
    assert token_cost_of(COSTLY) == 5
    assert token_cost_of(replace(COSTLY, presence_penalty=1.0)) == 6
