"""Medians, percentiles, lists on the command line; tables and what is kept of them."""

import csv
import json
from pathlib import Path

import click
import pytest

import mgpu
from mgpu.launch.bench.options import rates, sizes, whole_numbers
from mgpu.launch.bench.probe import Decoded
from mgpu.launch.bench.report import Report, cell, percentile, spread, versions
from mgpu.launch.bench.startup import phases, startup_row
from mgpu.launch.bench.step import breakdown
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.startup_log import ready_line

CONTEXT, PARAM = click.Context(click.Command("x")), click.Option(["--x"])


def test_a_spread_is_median_least_and_greatest() -> None:
    assert spread("x", [3.0, 1.0, 8.0]) == {"x": 3.0, "x_low": 1.0, "x_high": 8.0}


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([5.0], 99, 5.0), ([1.0, 2.0, 3.0, 4.0], 50, 2.0), ([float(i) for i in range(200)], 99, 197.0), ([], 50, None)],
)
def test_percentiles_are_values_that_occurred(values: list[float], percent: float, expected: float | None) -> None:
    assert percentile(values[::-1], percent) == expected


def test_cells_show_shares_in_percent_and_few_digits() -> None:
    values = {12345.6: "12,346", 1000.0: "1,000", 234.56: "234.6", 100.0: "100.0", 1.234: "1.23", None: "-"}
    assert [cell("tokens_per_s", value) for value in values] == list(values.values())
    assert (cell("share", 0.816), cell("core_share_low", 0.0012)) == ("81.6%", "0.12%")


@pytest.mark.parametrize("name", ["rows.json", "deeper/rows.csv"])
def test_every_row_is_saved_at_once_and_says_what_was_measured_and_on_what(name: str, tmp_path: Path) -> None:
    shown, options = ("batch", "tokens_per_s"), ["--tp", "2"]
    report = Report("decode", "mgpu", shown, tmp_path / name, "pyzmq", model="tiny", serve_options=options)
    assert (tmp_path / name).exists(), "a place that cannot be written is found before anything is measured"
    report.add({"batch": 1, "tokens_per_s": 10.0})
    report.add({"batch": 2, "note": "left out"})
    if name.endswith("csv"):
        first, second = csv.DictReader((tmp_path / name).read_text().splitlines())
        assert (first["model"], first["tokens_per_s"], second["note"]) == ("tiny", "10.0", "left out")
        assert "pyzmq" in first["measured_on"]
    else:
        whole = json.loads((tmp_path / name).read_text())
        assert (whole["bench"], whole["engine"], whole["rows"][1]["note"]) == ("decode", "mgpu", "left out")
        assert {"date", "cpu", "gpus", "load", "versions"} <= whole["machine"].keys()


def test_versions_are_those_of_this_mgpu_and_of_what_is_installed() -> None:
    assert versions("click", "no-such-package").keys() == {"python", "mgpu", "click"}
    assert versions()["mgpu"] == mgpu.__version__


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--save"):
        Report("decode", "mgpu", (), tmp_path / "file" / "rows.json")


def test_lists_on_the_command_line_are_read_or_refused_with_an_example() -> None:
    assert whole_numbers(CONTEXT, PARAM, "1, 8,64") == (1, 8, 64)
    assert rates(CONTEXT, PARAM, "0.5,2") == (0.5, 2.0)
    assert sizes(CONTEXT, PARAM, "32x1024,4x8192") == ((32, 1024), (4, 8192))
    for read, text in ((whole_numbers, "1,x"), (whole_numbers, "0"), (rates, "-1"), (rates, "inf"), (sizes, "3x")):
        with pytest.raises(click.BadParameter, match="such as"):
            read(CONTEXT, PARAM, text)


def test_phases_are_read_from_the_line_that_the_server_logs() -> None:
    line = ready_line(3.8, {"spawn": 2.4, "rendezvous": 0.1, "weights": 1.1, "warmup": 0.2}, 96_900_000)
    assert phases(f"08:37:26 starting\n08:37:30 {line}\nmore") == {
        "spawn": 2.4, "rendezvous": 0.1, "weights": 1.1, "warmup": 0.2,
    }  # fmt: skip
    assert phases("nothing") == {}


def test_starts_are_summed_up_as_medians_by_phase() -> None:
    row = startup_row(
        "warm", [{"ready": 3.0, "spawn": 1.0}, {"ready": 5.0, "spawn": 2.0}, {"ready": 4.0, "spawn": 3.0}]
    )
    assert (row["ready_s"], row["spawn_s"]) == (4.0, 2.0)
    assert (row["ready_s_low"], row["ready_s_high"], row["repeats"]) == (3.0, 5.0, 3)


def test_a_step_is_broken_down_by_what_the_counters_grew() -> None:
    names = ("schedule", "publish", "apply", "compute", "starved")
    before = {"steps": 10.0, **{f"{name}_us_sum": 100.0 for name in names}}
    after = {"steps": 20.0, **{f"{name}_us_sum": 100.0 + 10 * i for i, name in enumerate(names, start=1)}}
    found = breakdown(Decoded(before, after, 0.001, 0.0))
    assert (found["wall_us"], found["schedule_us"], found["worker_us"], found["starved_us"]) == (100.0, 1.0, 4.0, 5.0)
    assert found["occupancy_share"] == pytest.approx(0.95)
