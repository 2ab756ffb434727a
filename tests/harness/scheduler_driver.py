"""A scheduler driven against a model that notices every mistake, step by step."""

import random
from array import array
from collections import deque
from collections.abc import Callable

from harness.servers.fake_model import FakeModel, solo_tokens
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.protocol.internal.gateway_messages import Submit
from mgpu.protocol.internal.worker_messages import RowSampling, StepPlan, StepResult
from mgpu.protocol.model.attention_facts import Sight
from mgpu.protocol.model.kv_pools import PoolSize


def limits(**changes: int | bool | Sight) -> Limits:
    values: dict[str, int | bool | Sight] = {
        "num_blocks": 64, "block_size": 4, "max_rows": 8, "max_batch_tokens": 32, "max_seq_len": 256, **changes,
    }  # fmt: skip
    return Limits(**values)  # type: ignore[arg-type]


def submit_of(
    sequence_id: int,
    prompt: list[int],
    max_tokens: int,
    stop_ids: tuple[int, ...] = (),
    priority: int = 0,
    salt: bytes = b"",
    account: int = 0,
    weight: float = 1.0,
    emitted: tuple[int, ...] = (),
) -> Submit:
    ids, stops = array("i", [*prompt, *emitted]).tobytes(), list(stop_ids)
    row = RowSampling()
    return Submit(sequence_id, ids, max_tokens, stops, row, salt, priority, [account], [weight], len(emitted))


class Harness:
    """A scheduler, the fake model behind a pipeline of ``num_stages``, and what came out per request."""

    def __init__(self, **changes: int | bool | Sight) -> None:
        self.limits = limits(**changes)
        self.scheduler = Scheduler(self.limits)
        self.model = self._new_model(PoolSize(self.limits.num_blocks, self.limits.num_pages))
        self.results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, str] = {}
        self.errors: dict[int, str] = {}
        self.cached: dict[int, int] = {}
        self.prefilled_again = 0

    def _new_model(self, pool: PoolSize) -> FakeModel:
        now = self.limits
        shape = pool.num_blocks, now.block_size, now.num_stages, now.num_snapshots > 0
        return FakeModel(*shape, pool.num_pages, now.sight)

    def submit(self, sequence_id: int, prompt: list[int], max_tokens: int, **more: object) -> None:
        self.scheduler.submit(submit_of(sequence_id, prompt, max_tokens, **more))  # type: ignore[arg-type]
        self.collect()

    def cancel(self, sequence_id: int, reason: str = "cancelled") -> None:
        self.scheduler.cancel(sequence_id, reason)
        self.collect()

    def publish(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        assert sum(plan.counts) <= self.limits.max_batch_tokens
        self.plans.append(plan)
        self.results.append(StepResult(plan.epoch, plan.step, self.model.execute(plan), None, 0))
        return True

    def crash(self, epoch: int, num_blocks: int, num_pages: int = 0) -> None:
        """Lose the workers with everything that is under way, and go on with new ones."""
        self.prefilled_again = self.scheduler.forget_workers("boom")
        pool = PoolSize(num_blocks, num_pages)
        self.model = self._new_model(pool)
        self.results.clear()
        self.scheduler.use_workers(epoch, pool)
        self.collect()

    def gather(self) -> bool:
        if not self.results:
            return False
        self.scheduler.apply(self.results.popleft())
        self.collect()
        return True

    def collect(self) -> None:
        outputs = self.scheduler.take_outputs()
        if outputs is None:
            return
        columns = (outputs.sequence_ids, outputs.token_ids, outputs.finish, outputs.errors, outputs.cached_tokens)
        for sequence_id, tokens, finish, error, cached in zip(*columns, strict=True):
            assert sequence_id not in self.finish, "an output after the ending"
            self.tokens.setdefault(sequence_id, []).extend(tokens)
            self.cached.setdefault(sequence_id, cached)
            if finish:
                self.finish[sequence_id] = finish
                self.errors[sequence_id] = error

    def run(self, until: Callable[[], bool] = lambda: False, max_steps: int = 20_000) -> None:
        """Keep the pipeline full until everything is finished."""
        for _ in range(max_steps):
            if until():
                return
            while self.publish():
                pass
            if not self.gather():
                assert not self.scheduler.num_live, "live requests, but nothing to do"
                self.scheduler.check_integrity()
                return
        raise AssertionError(f"no end after {max_steps} steps")

    def answer(self, sequence_id: int, prompt: list[int], max_tokens: int = 4) -> list[int]:
        """Run one sequence to its end; return its tokens, which are those that it has alone."""
        self.submit(sequence_id, prompt, max_tokens)
        self.run()
        self.scheduler.check_integrity()
        assert self.tokens[sequence_id] == solo_tokens(prompt, max_tokens)
        return self.tokens[sequence_id]

    def answer_choices(self) -> None:
        """Run three choices of one prompt at once: the prompt is computed once, and each has its own tokens."""
        for sequence_id in range(3):
            self.submit(sequence_id, prompt_of(1, 22), 8)
        self.run()
        assert self.cached == {0: 0, 1: 20, 2: 20}
        assert all(tokens == solo_tokens(prompt_of(1, 22), 8) for tokens in self.tokens.values())


def prompt_of(seed: int, length: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(1000) for i in range(length)]
