"""Hugging Face transformers' continuous batching under the questions of `bench/performance`.

    python -m bench.peers.hf_continuous_performance --shape 8B --device cuda --decode 1x128,64x1024 --save F

All requests of a batch come at once; decoding is counted from the last first token to the first end of an answer.
"""

import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence

from bench.peers.hf_continuous import sender, start_manager
from bench.peers.hf_model import make_model
from bench.performance.rows import (
    BENCH,
    BURST,
    BURST_TOKENS,
    DECODE,
    FAILED,
    FIRST_TOKEN,
    SHOWN,
    TOKENS_PER_S,
    PeerOptions,
    missing,
    peer_options,
    row,
    window_rates,
)  # fmt: skip
from mgpu.launch.bench.load import Request, Send
from mgpu.launch.bench.report import Report

NEW_TOKENS = 128
"""Enough that all decode together for a while, although prompts are computed one after the other."""
DEADLINE_S = 45.0
"""Longest time of one run; attention without a flash kernel can take seconds per step."""
FIRST_S = 180.0
"""Longest time of the first request, for which the manager makes its cache and graphs."""
FIRST_TOKENS = 5

Arrivals = list[tuple[float, int]]
"""When tokens arrived, and how many."""


class Asked:
    """One manager under the questions."""

    def __init__(self, send: Send, vocab_size: int, options: PeerOptions, report: Report) -> None:
        self.send = send
        self.options = options
        self.report = report
        self._vocab_size = vocab_size
        self._random = random.Random(0)

    async def batch(self, count: int, length: int, new_tokens: int, deadline_s: float = DEADLINE_S) -> list[Arrivals]:
        """Answer prompts that come at once; give when the tokens of each arrived, in seconds from then.

        TimeoutError when that takes longer than ``deadline_s``.
        """
        began_s = time.perf_counter()

        async def one() -> Arrivals:
            ids = [self._random.randrange(3, self._vocab_size) for _ in range(length)]
            pieces = self.send(Request(ids, new_tokens))
            return [(time.perf_counter() - began_s, tokens) async for tokens in pieces if tokens]

        async with asyncio.timeout(deadline_s):
            return list(await asyncio.gather(*(one() for _ in range(count))))

    async def decode(self, count: int, length: int) -> Sequence[float]:
        size = self.options.effort.size
        answers = await self.batch(size(count), size(length), max(8, size(NEW_TOKENS)))
        began_s = max(answer[0][0] for answer in answers)
        ended_s = min(answer[-1][0] for answer in answers)
        together = sorted(arrival for answer in answers for arrival in answer if began_s <= arrival[0] <= ended_s)
        return window_rates(together, self.options.effort.repeat)

    async def first_token(self, count: int, length: int) -> Sequence[float]:
        times = FIRST_TOKENS * self.options.effort.repeat
        runs = [await self.batch(count, self.options.effort.size(length), 2) for _ in range(1 + times)]
        return [1e3 * answers[0][0][0] for answers in runs[1:]]

    async def burst(self, count: int, length: int) -> Sequence[float]:
        size = self.options.effort.size
        answers = await self.batch(size(count), size(length), size(BURST_TOKENS))
        tokens = sum(number for answer in answers for _, number in answer)
        return [tokens / max(answer[-1][0] for answer in answers)]

    async def ask(self) -> None:
        """Ask everything. What takes too long ends it: the manager would go on with it beside what comes next."""
        await self.batch(1, 8, 4, FIRST_S)
        asked = [
            *((FIRST_TOKEN, "ms", self.first_token, size) for size in self.options.first_token),
            *((DECODE, TOKENS_PER_S, self.decode, size) for size in self.options.decode),
            *((BURST, TOKENS_PER_S, self.burst, size) for size in self.options.burst),
        ]
        for index, (what, unit, measure, size) in enumerate(asked):
            try:
                self.report.add(row(what, *size, unit, await measure(*size)))
            except TimeoutError:
                self.report.add(missing(what, *size, f"not done in {DEADLINE_S:g} s"))
                for left_out, _, _, other in asked[index + 1 :]:
                    self.report.add(missing(left_out, *other, f"left out: {what} of {size[0]} was not done in time"))
                return


def main() -> None:
    options = peer_options(__doc__ or "")
    model, facts = make_model(options.shape, options.effort.config(options.shape), options.device)
    report = Report(BENCH, "transformers continuous", SHOWN, options.save, "transformers", shape=options.shape, **facts)
    manager = start_manager(model, NEW_TOKENS)
    try:
        asyncio.run(Asked(sender(manager), model.config.vocab_size, options, report).ask())
    except Exception as error:  # the edge of the program: whatever transformers raises is what the table shows
        report.add(missing(FAILED, 0, 0, f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    os._exit(0)  # the manager's thread cannot be interrupted, and nothing is left to save


if __name__ == "__main__":
    main()
