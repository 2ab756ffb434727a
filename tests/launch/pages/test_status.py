"""The page of `status` and `top`."""

import os
import time

import pytest
from click.testing import CliRunner

from harness.assertions import assert_has_all
from mgpu.launch.commands.talk import status
from mgpu.launch.commands.talk.top import is_pressed
from mgpu.launch.pages.status import WIDTH, ServerStatus, counters, duration, page
from mgpu.protocol.errors import RequestFailed
from mgpu.protocol.front.server_messages import Health

GIB = float(1 << 30)
STATS = {
    "running": 12.0, "waiting": 3.0, "gateway_clients": 5.0, "finished": 1234.0, "tokens_per_s": 2314.4,
    "prompt_tokens_per_s": 7.25, "kv_blocks_used": 25.0, "kv_blocks_total": 100.0, "prompt_tokens": 1000.0,
    "prefix_hit_tokens": 710.0, "gateway_restarts": 1.0,
    "gpu0_memory_used_bytes": 61.25 * GIB, "gpu0_memory_total_bytes": 80 * GIB,
    "gpu10_memory_used_bytes": 8 * GIB, "gpu10_memory_total_bytes": 80 * GIB,
    "gpu2_memory_used_bytes": 0.0, "gpu2_memory_total_bytes": 80 * GIB,
}  # fmt: skip


def health(state: str = "ready", model: str = "Qwen3-32B", restarts: int = 0) -> Health:
    return Health(1, state, model, 40960, 401216, 15, 8000.0, "layout", 12, 3, 0.21, restarts, 4.5)


def test_the_page_has_what_a_person_asks_for() -> None:
    text = page(ServerStatus(health(restarts=2), STATS))
    assert text.startswith("READY")
    assert_has_all(
        text, "Qwen3-32B", "2,314 tokens/s, 7.2 of prompts", "12 running, 3 waiting, of 5 clients; 1,234 finished",
        "25% of 401,216 tokens", "71% of them found", "61.2 of 80.0 GiB", "0.2 s ago", "2 h 13 min",
        "2 of the workers (the last took 4.5 s), 1 of the gateway", "40,960 tokens",
    )  # fmt: skip
    assert [line.split("[")[0].strip() for line in text.splitlines() if line.startswith("GPU")] == [
        "GPU 0", "GPU 2", "GPU 10",
    ]  # fmt: skip


def test_the_page_of_a_router_has_a_line_for_each_replica() -> None:
    own = {"replica0_ready": 1.0, "replica0_tokens_per_s": 1234.0, "replica0_requests": 7.0}
    own |= {"replica0_kv_blocks_used": 1.0, "replica0_kv_blocks_total": 4.0, "replica1_ready": 0.0}
    own |= {"replica0_gpu1_memory_used_bytes": 2.0**30, "replica0_gpu1_memory_total_bytes": 2.0**31}
    text = page(ServerStatus(health(), {**STATS, **own}))
    assert_has_all(
        text, "replica0       ready, 1,234 tokens/s, 7 requests, 25% of its KV cache", "1.0 of 2.0 GiB",
        "replica1       takes no requests, 0.0 tokens/s",
    )  # fmt: skip


def test_lines_fit_a_terminal() -> None:
    huge = dict.fromkeys(STATS, 10.0**15)
    text = page(ServerStatus(health("recovering", "org/" + "m" * 200, restarts=10**9), huge))
    assert max(map(len, text.splitlines())) <= WIDTH == 80
    assert "…" in text.splitlines()[0]


def test_a_server_whose_engine_does_not_answer_has_a_page_too() -> None:
    text = page(ServerStatus(health("stalled"), {}))
    assert_has_all(text, "STALLED", "does not answer", "Qwen3-32B")


def test_counters_are_listed_by_name() -> None:
    assert counters(ServerStatus(health(), {"steps": 12345.0})).split() == ["steps", "12,345"]


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (45, "45 s"), (185, "3 min 5 s"), (7620, "2 h 7 min"), (3600, "1 h 0 min"), (360000, "4 d 4 h"),
])  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class StartingServer:
    """What `status` asks of a client while the server's engine starts."""

    def __init__(self, *_: object, **options: object) -> None: ...

    def __enter__(self) -> "StartingServer":
        return self

    def __exit__(self, *_: object) -> None: ...

    def health(self) -> Health:
        return health("starting")

    def stats(self) -> dict[str, float]:
        raise RequestFailed("not_ready", "the engine did not answer", 1.0)

    def models(self) -> list[dict[str, object]]:
        return []


@pytest.mark.parametrize("options", [[], ["--json"], ["--stats"]])
def test_a_server_that_is_not_ready_is_shown_and_ends_with_69(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(status, "Client", StartingServer)
    done = CliRunner().invoke(status.status_command, options)
    assert "starting" in done.output.lower()
    assert isinstance(done.exception, status.ServerError)
    assert done.exception.exit_code == 69


def test_keys_are_waited_for_and_the_end_of_input_is_no_key() -> None:
    keyboard, typed = os.pipe()
    try:
        os.write(typed, b"xyz")
        assert not is_pressed(keyboard, 0.05, b"qQ")
        os.write(typed, b"xQ")
        assert is_pressed(keyboard, 20, b"qQ")
        os.close(typed)
        began_s = time.monotonic()
        assert not is_pressed(keyboard, 0.05, b"qQ")
        assert time.monotonic() - began_s >= 0.05
        assert not is_pressed(None, 0.05, b"qQ")
    finally:
        os.close(keyboard)
