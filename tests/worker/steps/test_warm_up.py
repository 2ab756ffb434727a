"""What is run before a worker says that it is ready."""

from unittest.mock import MagicMock

from mgpu.protocol.internal.worker_messages import StepPlan
from mgpu.worker.steps.model_runner import ModelRunner


def test_sampling_with_and_without_filters_is_warm_and_the_row_is_free_again() -> None:
    runner = MagicMock(_num_stages=2, _graphs=None)
    runner._rows.block_size = 4
    ModelRunner.warm_up(runner, 6, 3)
    plans: list[StepPlan] = [call.args[0] for call in runner.run.call_args_list]
    samplings = [row.sampling for plan in plans for row in plan.new_rows]
    assert [(each.temperature > 0.0, each.top_p < 1.0) for each in samplings] == [(True, False), (True, True)]
    assert [plan.step for plan in plans] == [-12, -10, -8, -6, -4, -2, 0]
    assert [plan.counts for plan in plans] == [[6], [1], [1], [6], [1], [1], []]
    assert plans[-1].free_rows == [0]
