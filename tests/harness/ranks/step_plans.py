"""Step plans that exercise a worker's rows: prompts in chunks, decoding beside them, blocks and rows that change."""

import random

import torch

from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan

BLOCK, BLOCKS_OF_ROW, ROWS = 16, 8, 5
SAMPLINGS = (
    RowSampling(),
    RowSampling(temperature=0.8, seed=11),
    RowSampling(temperature=1.2, top_k=7, seed=1 << 40),
    RowSampling(frequency_penalty=0.5, presence_penalty=0.3),
    RowSampling(temperature=1.0, seed=5, num_logprobs=2),
)


def make_plans() -> list[StepPlan]:
    """Yield prompts in chunks, decoding beside them, blocks that arrive when they are needed, and rows that change."""
    draw = random.Random(0)
    plans: list[StepPlan] = []
    done: dict[int, tuple[int, int]] = {}  # row: tokens computed, tokens of the prompt
    for step in range(60):
        plan = StepPlan(0, step, [], [], [], [], [], [], [], [])
        if step % 20 == 15:
            row = draw.choice(sorted(done))
            del done[row]
            plan.free_rows.append(row)
        rows = sorted(done, key=lambda row: done[row][0] < done[row][1])
        waiting = [row for row in range(ROWS) if row not in done and row not in plan.free_rows]
        if waiting and step % 4 == 0:
            row, length = waiting[0], draw.randrange(1, 50)
            ids = torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(step), dtype=torch.int32)
            blocks = [row * BLOCKS_OF_ROW + i for i in range(-(-length // BLOCK))]
            plan.new_rows.append(NewRow(row, ids.numpy().tobytes(), length, blocks, SAMPLINGS[row]))
            done[row] = 0, length
            rows.append(row)
        for row in rows:
            start, length = done[row]
            count = min(20, length - start) if start < length else 1
            if start >= length and start % BLOCK == 0:
                plan.block_rows.append(row)
                plan.block_ids.append(row * BLOCKS_OF_ROW + start // BLOCK)
            plan.rows.append(row)
            plan.starts.append(start)
            plan.counts.append(count)
            plan.samples.append(int(start + count >= length))
            done[row] = start + count, length
        plans.append(plan)
    return plans
