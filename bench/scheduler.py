"""Time what the orchestrator does per decode step: schedule, encode the plan, decode the result, apply, encode outputs.

    python -m bench.scheduler [ROWS …]

No sockets and no workers: tokens are made up. Prints the median and the 99th percentile over the steps, in µs.
"""

import statistics
import sys
import time
from array import array
from collections import deque

from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.protocol.internal.gateway_messages import LINK, Submit
from mgpu.protocol.internal.worker_messages import CONTROL, RowSampling, StepPlan, StepResult

PROMPT_TOKENS = 64
NEW_TOKENS = 400
STAGES = ("schedule", "encode", "decode", "apply", "outputs")


def measure(num_rows: int) -> dict[str, list[float]]:
    """Run ``num_rows`` requests to their end and give the seconds of every pure decode step, by part."""
    limits = Limits(num_blocks=40 * num_rows, block_size=16, max_rows=256, max_batch_tokens=2048, max_seq_len=4096)
    scheduler = Scheduler(limits)
    for i in range(num_rows):
        prompt = array("i", range(i, i + PROMPT_TOKENS)).tobytes()
        # Lengths differ, so that ends and new blocks are spread over the steps as in real traffic.
        scheduler.submit(Submit(i, prompt, NEW_TOKENS + i % 37, [0], RowSampling(), b"", 0))
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    results: deque[bytes] = deque()
    while scheduler.num_live:
        times = [time.perf_counter()]
        plan = scheduler.schedule()
        times.append(time.perf_counter())
        if plan is not None:
            CONTROL.encode(plan)
        times.append(time.perf_counter())
        if plan is not None:
            results.append(_result_of(plan))
        if plan is not None and len(results) < 2:
            continue
        times.append(time.perf_counter())
        result = CONTROL.decode(results.popleft())
        times.append(time.perf_counter())
        scheduler.apply(result)
        times.append(time.perf_counter())
        outputs = scheduler.take_outputs()
        if outputs is not None:
            LINK.encode(outputs)
        times.append(time.perf_counter())
        if plan is not None and len(plan.rows) == num_rows == sum(plan.counts):
            for stage, begin in zip(STAGES, (0, 1, 3, 4, 5), strict=True):
                seconds[stage].append(times[begin + 1] - times[begin])
    return seconds


def _result_of(plan: StepPlan) -> bytes:
    tokens = [1 + (start * 7 + row) % 31_000 for row, start in zip(plan.rows, plan.starts, strict=True)]
    return CONTROL.encode(StepResult(0, plan.step, tokens[: sum(plan.samples)], None, 0))


def main() -> None:
    print(f"{'rows':>5} {'steps':>6} " + " ".join(f"{stage:>9}" for stage in STAGES) + "     total       p99")
    for num_rows in map(int, sys.argv[1:] or ["1", "8", "64", "256"]):
        seconds = measure(num_rows)
        totals = [sum(step) for step in zip(*seconds.values(), strict=True)]
        medians = [statistics.median(seconds[stage]) * 1e6 for stage in STAGES]
        p99 = statistics.quantiles(totals, n=100)[98] * 1e6
        columns = " ".join(f"{value:9.1f}" for value in medians)
        print(f"{num_rows:5} {len(totals):6} {columns} {statistics.median(totals) * 1e6:9.1f} {p99:9.1f}")


if __name__ == "__main__":
    main()
