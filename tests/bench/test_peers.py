"""How peers are asked, and how their answers are counted; without the peers themselves."""

import argparse
import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.compare import PEERS, commands
from bench.peers.llama_cpp import Answer
from bench.peers.peer import most_at_once, streamed
from mgpu.launch.bench.load import Request, closed_loop

BENCH = Path(__file__).parents[2] / "bench"
Told = list[int | Exception | None]


def test_what_another_thread_reports_is_streamed_until_it_ends() -> None:
    def start(request: Request, notify: Callable[[int | Exception | None], None]) -> None:
        words: Told = [1, 2, None] if request.new_tokens == 3 else [1, RuntimeError("out of memory"), None]
        threading.Thread(target=lambda: [notify(word) for word in words]).start()

    outcomes = asyncio.run(closed_loop(streamed(start), [Request([1], 3), Request([1], 4)], 1))
    assert [(outcome.num_tokens, outcome.error) for outcome in outcomes] == [
        (3, ""),
        (1, "RuntimeError: out of memory"),
    ]


def test_a_report_that_comes_too_late_harms_nobody() -> None:
    notifiers: list[Callable[[int | Exception | None], None]] = []

    def start(_: Request, notify: Callable[[int | Exception | None], None]) -> None:
        notifiers.append(notify)
        notify(None)

    asyncio.run(closed_loop(streamed(start), [Request([1], 1)], 1))
    notifiers[0](7)


def test_tokens_without_text_are_counted_at_the_end_of_an_answer_of_llama_cpp() -> None:
    told: Told = []
    answer = Answer(told.append)
    for chunk in ('{"choices":[{"text":"a"}]}', '{"choices":[{"text":""}],"usage":{"completion_tokens":3}}'):
        answer.take(chunk)
    assert told == [1, 2]
    answer.take('{"error":{"message":"slot"}}')
    assert isinstance(told[-1], RuntimeError)


def test_peers_hold_as_many_requests_as_can_be_in_flight() -> None:
    options = argparse.Namespace(concurrency=[1, 8], burst=[], rate=[], requests=64)
    assert most_at_once(options) == 8
    options.rate = [0.5]
    assert most_at_once(options) == 64


def test_all_engines_get_the_same_load() -> None:
    options = argparse.Namespace(
        shape="tiny", device="cpu", bandwidth="", peers=list(PEERS), concurrency="1,2", requests=4, repeat=1,
        prompt_tokens=16, new_tokens=8,
    )  # fmt: skip
    found = commands(options)
    assert list(found) == ["mgpu", *PEERS]
    load = ["--concurrency", "1,2", "--requests", "4", "--repeat", "1", "--prompt-tokens", "16", "--new-tokens", "8"]
    for command in found.values():
        start = command.index("--concurrency")
        assert command[start : start + len(load)] == load


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_has_its_script(peer: str) -> None:
    assert (BENCH / "peers" / f"{peer}.py").is_file()
