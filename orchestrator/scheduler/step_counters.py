"""What the scheduler counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class StepCounters:
    """Totals since the start, under the names and in the order that clients see."""

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    discarded_tokens: int = 0
    finished: int = 0
    preemptions: int = 0
    steps: int = 0
    replays: int = 0
