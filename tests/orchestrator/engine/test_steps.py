"""The steps in flight, without processes: results are applied once, and none is lost."""

import time
from array import array
from types import SimpleNamespace
from typing import cast

from mgpu.orchestrator.engine.steps import StepPipeline
from mgpu.orchestrator.processes.worker_processes import WorkerProcesses
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.protocol.internal.gateway_messages import Submit
from mgpu.protocol.internal.worker_messages import (
    CONTROL,
    RowGrammar,
    RowSampling,
    StepPlan,
    StepResult,
    Vocabulary,
)
from mgpu.protocol.model.kv_pools import PoolSize


class FakeGroup:
    """Answers every plan, the oldest first."""

    def __init__(self) -> None:
        self.epoch = 0
        self.results: list[StepResult] = []
        self.vocabularies: list[Vocabulary] = []

    def publish(self, data: bytes) -> None:
        plan = CONTROL.decode(data)
        if isinstance(plan, Vocabulary):
            self.vocabularies.append(plan)
            return
        assert isinstance(plan, StepPlan)
        self.results.append(StepResult(0, plan.step, [7] * sum(plan.samples), None, 10))

    def try_result(self) -> StepResult | None:
        return self.results.pop(0) if self.results else None


def test_a_result_that_was_found_is_applied_even_when_something_fails_before_that() -> None:
    scheduler = Scheduler(Limits(num_blocks=16, block_size=4, max_rows=4, max_batch_tokens=16, max_seq_len=64))
    workers = SimpleNamespace(is_ready=True, group=FakeGroup())
    steps = StepPipeline(scheduler, cast(WorkerProcesses, workers), spin_s=0.0, hang_timeout_s=10.0)
    scheduler.submit(Submit(1, array("i", [1, 2, 3]).tobytes(), 3, [], RowSampling(), b"", 0))
    tokens: list[int] = []
    for _ in range(4):
        steps.publish()
        steps.spin()
        steps.spin()  # as after a failure of the gateway, noticed between finding a result and applying it
        steps.apply()
        outputs = scheduler.take_outputs()
        for new_tokens in outputs.token_ids if outputs else []:
            tokens += new_tokens
    assert tokens == [7, 7, 7]
    assert scheduler.num_live == 0


def test_each_worker_group_gets_the_vocabulary_before_its_first_row_with_a_grammar() -> None:
    scheduler = Scheduler(Limits(num_blocks=16, block_size=4, max_rows=4, max_batch_tokens=16, max_seq_len=64))
    group = FakeGroup()
    workers = SimpleNamespace(is_ready=True, group=group)
    steps = StepPipeline(scheduler, cast(WorkerProcesses, workers), spin_s=0.0, hang_timeout_s=10.0)
    prompt, structured = array("i", [1, 2, 3]).tobytes(), RowSampling(grammar=RowGrammar("start: /a/", [5]))
    steps.vocabulary = Vocabulary(0, [b"a"], [])

    def run(sequence_id: int, sampling: RowSampling) -> list[int]:
        scheduler.submit(Submit(sequence_id, prompt, 1, [], sampling, b"", 0))
        steps.publish()
        steps.apply()
        return [each.epoch for each in group.vocabularies]

    assert run(1, RowSampling()) == []
    assert run(2, structured) == [0]
    assert run(3, structured) == [0]
    scheduler.forget_workers("a test")
    scheduler.use_workers(1, PoolSize(16))
    group.epoch = 1
    assert run(4, structured) == [0, 1]


def test_the_gateway_hears_once_how_long_each_sequence_has_waited_for_its_first_step() -> None:
    scheduler = Scheduler(Limits(num_blocks=16, block_size=4, max_rows=1, max_batch_tokens=16, max_seq_len=64))
    workers = SimpleNamespace(is_ready=True, group=FakeGroup())
    steps = StepPipeline(scheduler, cast(WorkerProcesses, workers), spin_s=0.0, hang_timeout_s=10.0)
    prompt, now_s = array("i", [1, 2, 3]).tobytes(), time.monotonic()
    for sequence_id, waited_s in ((1, 3.0), (2, 5.0)):
        scheduler.submit(Submit(sequence_id, prompt, 2, [], RowSampling(), b"", 0), now_s - waited_s)
    heard: list[tuple[int, float]] = []
    while scheduler.num_live:
        steps.publish()
        steps.apply()
        outputs = scheduler.take_outputs()
        heard += outputs.queue_s.items() if outputs else []
    assert [sequence_id for sequence_id, _ in heard] == [1, 2]
    assert heard[0][1] >= 3.0
    assert heard[1][1] >= 5.0
    assert steps.counters()["queue_s_le_inf"] == 2
    assert steps.counters()["queue_s_sum"] == sum(waited_s for _, waited_s in heard)
