"""The benchmarks as people type them, on one tiny server with random weights."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mgpu.launch.bench.shapes import TINY, write_config
from mgpu.launch.bench.startup import PHASES
from mgpu.launch.bench.target import Target
from mgpu.launch.cli import cli
from mgpu.launch.server_process import ServerProcess
from mgpu.orchestrator.errors import UserError

SERVE = ("--device", "cpu", "--kv-memory", "16MiB", "--max-rows", "8")
Bench = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_config(tmp_path_factory.mktemp("tiny"), {**TINY, "num_hidden_layers": 1})
    with ServerProcess("-m", str(folder), "--load-format", "dummy", *SERVE) as process:
        process.wait_ready()
        yield process


@pytest.fixture
def bench(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run a benchmark on the server that is there already, in place of one of its own."""

    @contextlib.contextmanager
    def running(target: Target) -> Iterator[str]:
        yield server.wait_ready()

    monkeypatch.setattr("mgpu.launch.bench.target.serving", running)
    monkeypatch.setattr("mgpu.launch.bench.serve.serving", running)
    monkeypatch.setattr(Target, "start", lambda target, **settings: contextlib.nullcontext(server))

    def invoke(*words: str) -> Result:
        options = ("--shape", "tiny", "--bandwidth", "10GB/s", "--repeat", "1")
        return CliRunner().invoke(cli, ["bench", *words, *options, "--", *SERVE], catch_exceptions=False)

    return invoke


def saved(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    assert isinstance(rows, list)
    return rows


def test_decode_measures_each_batch_that_fits(bench: Bench, tmp_path: Path) -> None:
    done = bench("decode", "--batches", "1,2,9", "--contexts", "8", "--seconds", "0.1", "--save", str(tmp_path / "d"))
    assert "--max-rows 9" in done.output
    one, two, nine = saved(tmp_path / "d")
    assert one["tokens_per_s"] > 0
    assert 0 < two["share"] < 1
    assert "tokens_per_s" not in nine
    options = json.loads((tmp_path / "d").read_text())["serve_options"]
    assert options == ["-m", "tiny", "--load-format", "dummy", *SERVE], "no folder of this machine"


def test_prefill_measures_what_the_context_holds(bench: Bench, tmp_path: Path) -> None:
    done = bench("prefill", "--sizes", "1x8,2x8,1x99999", "--save", str(tmp_path / "p"))
    assert "left out" in done.output
    assert [row.get("tokens_per_s", 0) > 0 for row in saved(tmp_path / "p")] == [True, True, False]


def test_serve_measures_closed_loops_poisson_arrivals_and_bursts(bench: Bench, tmp_path: Path) -> None:
    loads = ("--concurrency", "1,2", "--rate", "100", "--burst", "3", "--requests", "3")
    done = bench("serve", *loads, "--prompt-tokens", "8", "--new-tokens", "3", "--save", str(tmp_path / "s"))
    assert done.exit_code == 0, done.output
    rows = saved(tmp_path / "s")
    assert [(row["load"], row["requests"], row["errors"]) for row in rows] == [
        ("closed", 4, 0), ("closed", 8, 0), ("poisson", 3, 0), ("burst", 3, 0),
    ]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 and row["ttft_p50_ms"] > 0 and row["gap_p99_ms"] > 0 for row in rows)


def test_step_breaks_the_time_of_a_step_down(bench: Bench, tmp_path: Path) -> None:
    bench("step", "--batches", "2", "--context", "8", "--seconds", "0.2", "--save", str(tmp_path / "t"))
    (row,) = saved(tmp_path / "t")
    assert row["wall_us"] > row["schedule_us"] + row["publish_us"] + row["apply_us"] > 0
    assert 0 < row["occupancy_share"] <= 1


def test_an_idle_server_leaves_the_cores_alone(bench: Bench, tmp_path: Path) -> None:
    bench("idle", "--seconds", "1", "--save", str(tmp_path / "i"))
    (row,) = saved(tmp_path / "i")
    assert row["processes"] == 3
    assert row["core_share"] < 0.1  # measured: far below 1 %


def test_startup_reads_the_phases_of_a_cold_start_and_of_warm_ones(bench: Bench, tmp_path: Path) -> None:
    bench("startup", "--save", str(tmp_path / "u"))
    cold, warm = saved(tmp_path / "u")
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    assert {f"{phase}_s" for phase in PHASES} <= cold.keys()
    assert warm["ready_s"] > 0


@pytest.mark.parametrize(("words", "text"), [
    (("decode", "-m", "x", "--shape", "tiny"), "drop one of them"),
    (("decode", "--bandwidth", "fast", "--shape", "tiny"), "4.30TB/s"),
    (("serve", "--shape", "tiny", "--", "--device", "cpu", "--tp", "3"), "3"),
])  # fmt: skip
def test_mistakes_end_before_any_server_is_started(words: tuple[str, ...], text: str) -> None:
    with pytest.raises(UserError, match=text):
        CliRunner().invoke(cli, ["bench", *words], catch_exceptions=False)


@pytest.mark.parametrize("words", [
    *(("idle", "--seconds", text) for text in ("nan", "0", "-1", "inf", "1e99")),
    ("decode", "--batches", ""),
    ("decode", "--contexts", ","),
    ("prefill", "--sizes", ""),
])  # fmt: skip
def test_nothing_is_measured_for_numbers_that_mean_nothing(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, ["bench", *words, "--shape", "tiny", "--", "--device", "cpu"])
    assert isinstance(done.exception, SystemExit), done.exception
    assert f"Invalid value for '{words[1]}'" in done.output
