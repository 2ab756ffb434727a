"""Hugging Face transformers under the questions of `bench/performance`: `generate` with static batches.

    python -m bench.peers.hf_performance --shape 8B --device cuda --decode 1x128,64x1024 --prefill 32x1024 --save F

Decoding is timed between the tokens of one call, in as many windows as mgpu gets runs, so that prompts are computed
once. Everything is at its default, which is eager PyTorch with its own attention (sdpa) and a cache that grows.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from bench.peers.hf_model import make_model
from bench.performance.rows import (
    BENCH,
    BURST,
    BURST_TOKENS,
    DECODE,
    FIRST_TOKEN,
    PREFILL,
    SHOWN,
    TOKENS_PER_S,
    PeerOptions,
    missing,
    peer_options,
    row,
    window_rates,
)  # fmt: skip
from mgpu.launch.bench.report import Report

WINDOW_STEPS = 16
UNCOUNTED = 2
"""Steps after a prompt that still make buffers."""
FIRST_TOKENS = 5


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token of a batch is on the host; the first call brings the prompts."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing: the last token was noted."""


class Asked:
    """One model under the questions."""

    def __init__(self, model: Any, options: PeerOptions, report: Report) -> None:
        self.model = model
        self.effort = options.effort
        self.report = report

    def run(self, count: int, length: int, new_tokens: int) -> list[float]:
        """Answer fresh random prompts; return the seconds from the call to each token of the batch."""
        ids = torch.randint(3, self.model.config.vocab_size, (count, length), device=self.model.device)
        clock, began_s = Clock(), time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, pad_token_id=0, streamer=clock,
            )  # fmt: skip
        return [at_s - began_s for at_s in clock.times_s[1:]]

    def add(
        self, what: str, count: int, length: int, unit: str, measure: Callable[[int, int], Sequence[float]]
    ) -> None:
        """Add a row; one that does not fit says so."""
        try:
            values = measure(self.effort.size(count), self.effort.size(length))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.report.add(missing(what, count, length, "does not fit into the memory of the GPU"))
            return
        self.report.add(row(what, count, length, unit, values))

    def decode(self, count: int, length: int) -> Sequence[float]:
        steps = UNCOUNTED + WINDOW_STEPS * self.effort.repeat
        times_s = self.run(count, length, 1 + steps)[UNCOUNTED:]
        return window_rates([(at_s, count) for at_s in times_s], self.effort.repeat)

    def prefill(self, count: int, length: int) -> Sequence[float]:
        self.run(count, length, 1)
        return [count * length / self.run(count, length, 1)[0] for _ in range(self.effort.repeat)]

    def first_token(self, count: int, length: int) -> Sequence[float]:
        self.run(count, length, 1)
        return [1e3 * self.run(count, length, 1)[0] for _ in range(FIRST_TOKENS * self.effort.repeat)]

    def burst(self, count: int, length: int) -> Sequence[float]:
        new_tokens = self.effort.size(BURST_TOKENS)
        return [count * new_tokens / self.run(count, length, new_tokens)[-1]]


def main() -> None:
    options = peer_options(__doc__ or "")
    model, facts = make_model(options.shape, options.effort.config(options.shape), options.device)
    report = Report(BENCH, "transformers generate", SHOWN, options.save, "transformers", shape=options.shape, **facts)
    asked = Asked(model, options, report)
    asked.run(1, 8, 4)
    for (count, length), (what, unit, measure) in itertools.chain(
        zip(options.decode, itertools.repeat((DECODE, TOKENS_PER_S, asked.decode))),
        zip(options.first_token, itertools.repeat((FIRST_TOKEN, "ms", asked.first_token))),
        zip(options.prefill, itertools.repeat((PREFILL, TOKENS_PER_S, asked.prefill))),
        zip(options.burst, itertools.repeat((BURST, TOKENS_PER_S, asked.burst))),
    ):
        asked.add(what, count, length, unit, measure)


if __name__ == "__main__":
    main()
