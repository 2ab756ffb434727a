"""What a download shows, on a terminal and elsewhere."""

import io

import pytest

from mgpu.orchestrator.models.download_progress import DownloadProgress, progress_text, size_text, time_text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_terminal_has_one_line_that_is_written_over() -> None:
    clock, terminal, lines = Clock(), io.StringIO(), list[str]()
    progress = DownloadProgress("org/model", 10_000_000, lines.append, terminal, clock)
    for _ in range(10):
        clock.now += 0.1
        progress.add(1_000_000)
    progress.finish()
    shown = terminal.getvalue()
    assert "\n" not in shown
    assert "\rorg/model: 2 MB of 10 MB (20 %), 10 MB/s, 0.8 s left" in shown
    assert lines == ["org/model: 10 MB in 1.0 s (10 MB/s)"]


def test_elsewhere_single_lines_come_now_and_then() -> None:
    clock, lines = Clock(), list[str]()
    progress = DownloadProgress("org/model", 4_000_000_000, lines.append, None, clock)
    progress.skip(1_000_000_000)
    for _ in range(100):
        clock.now += 1
        progress.add(10_000_000)
    progress.finish()
    assert len(lines) == 4
    assert lines[0] == "org/model: 1.3 GB of 4 GB (32 %), 10 MB/s, 4 min left"
    assert lines[-1] == "org/model: 1 GB in 2 min (10 MB/s), 1 GB were there"


def test_the_rate_is_that_of_the_last_seconds() -> None:
    clock, lines = Clock(), list[str]()
    progress = DownloadProgress("m", 10**10, lines.append, None, clock)
    for rate in [10**8] * 31 + [10**6] * 60:
        clock.now += 1
        progress.add(rate)
    assert "100 MB/s" in lines[0]
    assert "1 MB/s" in lines[-1]


@pytest.mark.parametrize(("done", "rate", "text"), [
    (0, 0.0, "0 B of 1 kB (0 %), 0 B/s"), (500, 100.0, "500 B of 1 kB (50 %), 100 B/s, 5.0 s left"),
    (1000, 100.0, "1 kB of 1 kB (100 %), 100 B/s"),
])  # fmt: skip
def test_texts(done: int, rate: float, text: str) -> None:
    assert progress_text(done, 1000, rate) == text


def test_sizes_and_times() -> None:
    assert [size_text(size) for size in (0, 999, 1234, 99_960, 1_000_000, 4_372_812_000, 10**13, 10**16)] == [
        "0 B", "999 B", "1.23 kB", "100 kB", "1 MB", "4.37 GB", "10 TB", "10000 TB",
    ]  # fmt: skip
    assert [time_text(seconds) for seconds in (0.04, 9.9, 61, 100, 3600, 8000)] == [
        "0.0 s", "9.9 s", "61 s", "2 min", "60 min", "2 h 13 min",
    ]  # fmt: skip
