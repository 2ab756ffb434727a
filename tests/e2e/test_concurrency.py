"""Many streams at once: what survives equals its solo run, and every block comes back."""

import random
from dataclasses import dataclass
from typing import Any

from harness.models.text_model import VOCABULARY
from harness.waiting import eventually
from mgpu import Client
from mgpu.launch.server_process import running_server
from mgpu.protocol.client.client import CompletionStream

STREAMS = 64
DRAIN_S = 20.0


@dataclass
class Job:
    prompt: list[int]
    max_tokens: int
    cancel_after: int | None
    """Tokens after which the client leaves; None: stays to the end."""
    temperature: float
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens, "ignore_eos": True, "temperature": self.temperature, "seed": self.seed,
        }  # fmt: skip


def make_jobs(seed: int) -> list[Job]:
    """Draw prompts of 1 to 120 tokens, some of them beginning alike, and answers of 2 to 10 tokens, half greedy."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, VOCABULARY) for _ in range(40)]
    jobs = []
    for number in range(STREAMS):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.choice([1, 5, 17, 33, 80]))]
        if number % 4 == 0:
            prompt = shared + prompt
        length = rng.randrange(2, 11)
        leaves = rng.randrange(0, length) if number % 5 == 0 else None
        jobs.append(Job(prompt, length, leaves, temperature=number % 2, seed=number))
    return jobs


def run_together(client: Client, jobs: list[Job]) -> dict[int, list[int]]:
    """Run all jobs interleaved on one client; return the tokens of those that were not cancelled."""
    tokens: dict[int, list[int]] = {number: [] for number in range(len(jobs))}
    open_streams: dict[int, CompletionStream] = {
        number: client.stream(job.prompt, **job.options) for number, job in enumerate(jobs)
    }
    while open_streams:
        for number, stream in list(open_streams.items()):
            limit = jobs[number].cancel_after
            if limit is not None and len(tokens[number]) >= limit:
                stream.close()
                del open_streams[number]
                continue
            piece = next(stream, None)
            if piece is None:
                del open_streams[number]
            else:
                tokens[number] += piece.token_ids
    return {number: tokens[number] for number, job in enumerate(jobs) if job.cancel_after is None}


def wait_for_idle(client: Client) -> dict[str, float]:
    """Wait until nothing runs; return the counters of that moment."""

    def idle_stats() -> dict[str, float] | None:
        stats = client.stats()
        return None if stats["running"] or stats["waiting"] else stats

    found = eventually(idle_stats, client.stats, DRAIN_S)
    assert found is not None
    return found


def test_64_streams_with_cancellations_equal_their_solo_runs(random_endpoint: str) -> None:
    jobs = make_jobs(seed=20261124)
    with Client(random_endpoint) as client:
        together = run_together(client, jobs)
        assert len(together) == sum(job.cancel_after is None for job in jobs)
        stats = wait_for_idle(client)
        assert stats["kv_blocks_used"] == 0
        for number, token_ids in together.items():
            job = jobs[number]
            solo = client.generate(job.prompt, **job.options, cache_salt="solo")
            assert token_ids == list(solo.token_ids), f"job {number}: {job}"


def test_preempted_requests_equal_their_solo_runs(text_model: str) -> None:
    arguments = [
        "-m",
        text_model,
        "--device",
        "cpu",
        "--max-seq-len",
        "128",
        "--kv-memory",
        "176KiB",
        "--no-prefix-cache",
    ]
    prompts = [[100 + 7 * stream + i for i in range(30 + stream)] for stream in range(6)]
    with running_server(*arguments) as small, Client(small) as client:  # a pool of 176 tokens for 6 requests of 60
        more: list[dict[str, Any]] = [
            {"ignore_eos": True, "temperature": 1, "seed": 5},
            {"structured_outputs": {"regex": "([a-z]{1,9} ){40}"}},
        ] * 3
        streams = [client.stream(ids, max_tokens=24, **each) for ids, each in zip(prompts, more, strict=True)]
        together = [stream.completion().token_ids for stream in streams]
        stats = wait_for_idle(client)
        assert stats["preemptions"] > 0
        assert stats["kv_blocks_used"] == 0
        solo = [client.generate(ids, max_tokens=24, **each) for ids, each in zip(prompts, more, strict=True)]
        assert together == [each.token_ids for each in solo]


def test_seeded_sampling_does_not_depend_on_the_company(random_endpoint: str) -> None:
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 1234, "ignore_eos": True}
    with Client(random_endpoint) as client:
        solo = client.generate("Once upon a time", **options)
        crowd = [client.stream([7 + i, 300 + i], max_tokens=12, temperature=1.0, seed=i) for i in range(6)]
        among_others = client.generate("Once upon a time", **options)
        for stream in crowd:
            stream.completion()
    assert among_others.token_ids == solo.token_ids
