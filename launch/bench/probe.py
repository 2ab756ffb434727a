"""Ask one server in the ways whose speed is of interest."""

import random
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.orchestrator.errors import UserError
from mgpu.protocol.client.client import Client

MOST_NEW_TOKENS = 2048
SETTLE_S = 60.0
"""Longest wait for cancelled requests to be gone."""
STEP_S = 10.0
"""Longest wait for the end of a step."""


class NotMeasured(UserError):
    """What was to be measured did not happen; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the engine counted while a whole batch decoded."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    seconds: float
    mean_context: float
    """Tokens behind each row, in the middle of the count."""

    @property
    def tokens_per_s(self) -> float:
        return (self.after["generated_tokens"] - self.before["generated_tokens"]) / self.seconds


class Probe:
    """Asks one server; prompts are random. A second probe of the same server needs another ``seed``.

    No prefix is ever used again, unless ``repeats_prompts``: then batches of the same context decode behind the same
    prompts, which the server's prefix cache answers, so that only what is counted takes time.
    """

    def __init__(self, client: Client, vocab_size: int, seed: int = 0, repeats_prompts: bool = False) -> None:
        self._client = client
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._repeats_prompts = repeats_prompts
        self._prompts: dict[int, list[list[int]]] = defaultdict(list)
        health = client.health()
        self.max_seq_len, self.kv_tokens = health.max_seq_len, health.kv_tokens

    def prompt(self, length: int) -> list[int]:
        """Make a prompt of random tokens."""
        return [self._random.randrange(3, self._vocab_size) for _ in range(length)]

    def decode_rate(self, batch: int, context: int, seconds: float) -> tuple[float, float]:
        """Return tokens per second while a whole batch decodes, and the mean context meanwhile."""
        decoded = self.decode(batch, context, seconds)
        return decoded.tokens_per_s, decoded.mean_context

    def decode(self, batch: int, context: int, seconds: float) -> Decoded:
        """Let a whole batch decode for a while, then cancel what is still to come.

        Counted by the engine, between two looks at its counters, each just after a step: pieces that wait in the
        client would count twice as fast. NotMeasured when not the whole batch was decoding.
        """
        longest = min(MOST_NEW_TOKENS, self.max_seq_len - context)
        if longest < 2:
            raise NotMeasured(f"a context of {context} leaves no room to decode in the {self.max_seq_len} of the model")
        generated = self._client.stats()["generated_tokens"]
        prompts = self._batch(batch, context)
        streams = [self._client.stream(ids, max_tokens=longest, ignore_eos=True) for ids in prompts]
        for stream in streams:
            next(stream)
        before, began_s = self._after_a_step()
        time.sleep(seconds)
        after, ended_s = self._after_a_step()
        for stream in streams:
            stream.close()
        self._settle()
        if any((stats["running"], stats["waiting"]) != (batch, 0) for stats in (before, after)):
            raise NotMeasured(f"not all {batch} were decoding: of {longest} tokens some ended, or the KV cache is full")
        middle = (before["generated_tokens"] + after["generated_tokens"]) / 2 - generated
        return Decoded(before, after, ended_s - began_s, context + middle / batch)

    def _batch(self, count: int, length: int) -> list[list[int]]:
        if not self._repeats_prompts:
            return [self.prompt(length) for _ in range(count)]
        prompts = self._prompts[length]
        prompts += [self.prompt(length) for _ in range(count - len(prompts))]
        return prompts[:count]

    def _after_a_step(self) -> tuple[dict[str, float], float]:
        """Return counters and time just after a step has brought tokens: a step cut in two would count as a whole.

        Where no step ends any more, give what there is.
        """
        first = self._client.stats()
        deadline_s = time.perf_counter() + STEP_S
        while True:
            stats, now_s = self._client.stats(), time.perf_counter()
            is_over = now_s > deadline_s or not stats["running"]
            if is_over or stats["generated_tokens"] > first["generated_tokens"]:
                return stats, now_s

    def first_token_s(self, length: int) -> float:
        """Return the seconds from sending a prompt to its first token on an idle server."""
        ids = self.prompt(length)
        time.sleep(0.05)
        began_s = time.perf_counter()
        stream = self._client.stream(ids, max_tokens=2, ignore_eos=True)
        next(stream)
        elapsed_s = time.perf_counter() - began_s
        stream.completion()
        return elapsed_s

    def prefill_rate(self, count: int, length: int) -> float:
        """Return prompt tokens per second when ``count`` prompts come at once."""
        prompts = [self.prompt(length) for _ in range(count)]
        began_s = time.perf_counter()
        streams = [self._client.stream(ids, max_tokens=1, ignore_eos=True) for ids in prompts]
        for stream in streams:
            stream.completion()
        return count * length / (time.perf_counter() - began_s)

    def closed_loop(self, count: int, length: int, new_tokens: int) -> float:
        """Return output tokens per second when all requests come at once, until the last one ends."""
        prompts = [self.prompt(length) for _ in range(count)]
        began_s = time.perf_counter()
        streams = [self._client.stream(ids, max_tokens=new_tokens, ignore_eos=True) for ids in prompts]
        total = sum(len(stream.completion().token_ids) for stream in streams)
        return total / (time.perf_counter() - began_s)

    def _settle(self) -> None:
        """Wait until nothing runs. NotMeasured when something still does after a minute."""
        deadline_s = time.monotonic() + SETTLE_S
        while self._client.stats()["running"]:
            if time.monotonic() > deadline_s:
                raise NotMeasured(f"cancelled requests were still running after {SETTLE_S:g} s")
            time.sleep(0.01)
