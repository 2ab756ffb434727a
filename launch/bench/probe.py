"""Ask one server in the ways whose speed is of interest."""

import random
import time

from mgpu.orchestrator.errors import UserError
from mgpu.protocol.client import Client

MOST_NEW_TOKENS = 2048
SETTLE_S = 60.0
"""Longest wait for cancelled requests to be gone."""


class NotMeasured(UserError):
    """What was to be measured did not happen; the text says what to change."""


class Probe:
    """Asks one server; prompts are random, so that no prefix is ever reused. A second one needs another ``seed``."""

    def __init__(self, client: Client, vocab_size: int, seed: int = 0) -> None:
        self._client = client
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._generated = client.stats()["generated_tokens"]
        health = client.health()
        self.max_seq_len, self.kv_tokens = health.max_seq_len, health.kv_tokens

    def prompt(self, length: int) -> list[int]:
        """Make a prompt of random tokens."""
        return [self._random.randrange(3, self._vocab_size) for _ in range(length)]

    def decode_rate(self, batch: int, context: int, seconds: float) -> tuple[float, float]:
        """Give tokens per second while a whole batch decodes, and the mean context meanwhile.

        Counted by the engine, between two looks at its counters: pieces that wait in the client would count twice as
        fast. What is still to come then is cancelled. NotMeasured when not the whole batch was decoding.
        """
        before, after, seconds = self.decode_counters(batch, context, seconds)
        new_tokens = after["generated_tokens"] - before["generated_tokens"]
        generated = (before["generated_tokens"] + after["generated_tokens"]) / 2 - self._generated
        self._generated = self._client.stats()["generated_tokens"]
        return new_tokens / seconds, context + generated / batch

    def decode_counters(
        self, batch: int, context: int, seconds: float
    ) -> tuple[dict[str, float], dict[str, float], float]:
        """Give the server's counters before and after a while in which a whole batch decodes, and the seconds."""
        longest = min(MOST_NEW_TOKENS, self.max_seq_len - context)
        if longest < 2:
            raise NotMeasured(f"a context of {context} leaves no room to decode in the {self.max_seq_len} of the model")
        prompts = [self.prompt(context) for _ in range(batch)]
        streams = [self._client.stream(ids, max_tokens=longest, ignore_eos=True) for ids in prompts]
        for stream in streams:
            next(stream)
        before, began_s = self._client.stats(), time.perf_counter()
        time.sleep(seconds)
        after, ended_s = self._client.stats(), time.perf_counter()
        for stream in streams:
            stream.close()
        self._settle()
        if any((stats["running"], stats["waiting"]) != (batch, 0) for stats in (before, after)):
            raise NotMeasured(f"not all {batch} were decoding: of {longest} tokens some ended, or the KV cache is full")
        return before, after, ended_s - began_s

    def first_token_s(self, length: int) -> float:
        """Give the seconds from sending a prompt to its first token on an idle server."""
        ids = self.prompt(length)
        time.sleep(0.05)
        began_s = time.perf_counter()
        stream = self._client.stream(ids, max_tokens=2, ignore_eos=True)
        next(stream)
        elapsed_s = time.perf_counter() - began_s
        stream.completion()
        return elapsed_s

    def first_token_ms(self, length: int) -> float:
        """Give `first_token_s` in milliseconds."""
        return self.first_token_s(length) * 1e3

    def prefill_rate(self, count: int, length: int) -> float:
        """Give prompt tokens per second when ``count`` prompts come at once."""
        prompts = [self.prompt(length) for _ in range(count)]
        began_s = time.perf_counter()
        streams = [self._client.stream(ids, max_tokens=1, ignore_eos=True) for ids in prompts]
        for stream in streams:
            stream.completion()
        return count * length / (time.perf_counter() - began_s)

    def closed_loop(self, count: int, length: int, new_tokens: int) -> float:
        """Give output tokens per second when all requests come at once, until the last one ends."""
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
