"""What a GPU did, and when it did nothing."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_KERNEL = "_inputs_kernel"
"""What a decode step begins with (worker/kernels/step_inputs.py)."""


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel or copy on the GPU, in µs on the profiler's clock."""

    name: str
    start_us: float
    end_us: float


def idle_before_steps(spans: Sequence[Span]) -> list[float]:
    """Return the idle µs before each step except the first. Copies of the plan count as idle."""
    kernels = [span for span in spans if not span.name.startswith(("Memcpy", "Memset"))]
    idle, last_us = [], 0.0
    for before, span in itertools.pairwise(kernels):
        last_us = max(last_us, before.end_us)
        if FIRST_KERNEL in span.name:
            idle.append(max(0.0, span.start_us - last_us))
    return idle


def busy_us(spans: Sequence[Span]) -> float:
    """Return the µs in which a kernel or a copy ran."""
    busy, last_us = 0.0, 0.0
    for span in spans:
        busy += max(0.0, span.end_us - max(span.start_us, last_us))
        last_us = max(last_us, span.end_us)
    return busy
