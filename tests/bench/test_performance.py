"""The table of the performance page: every line has a part that measures it, and says what became of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.chaos.gpu import leak
from bench.kernels.gpu_spans import Span, busy_us, idle_before_steps
from bench.options import size_text, sizes
from bench.performance.__main__ import EXPECTED_S, PEERS, SERVERS, Run, note_failure
from bench.performance.records import next_path, read_results, record_paths, together
from bench.performance.rows import DECODE, FAILED, GAP, READY, REHEARSED, missing, row, window_rates
from bench.performance.server import Place
from bench.performance.table import BEGIN, END, LINES, insert, table
from bench.performance.throughput_plot import caption, lines_of

ROOT = Path(__file__).parents[2]
MACHINE = {"date": "2026-11-24", "cpu": "C", "gpus": ["G"], "versions": {"torch": "2.11"}}


def result(*rows: Any, **facts: Any) -> dict[str, Any]:
    return together([record(*rows, **facts)])


def record(*rows: Any, **facts: Any) -> dict[str, Any]:
    return {"machine": MACHINE, "rows": list(rows), **facts}


def save(folder: Path, part: str, *rows: Any, **facts: Any) -> str:
    path = next_path(folder, part)
    path.write_text(json.dumps(record(*rows, **facts)))
    return path.name


def line_of(text: str, title: str) -> list[str]:
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_every_decode_line_is_asked_of_its_server_and_of_its_peers() -> None:
    for line in LINES:
        assert {line.part, *line.peer_parts} <= set(EXPECTED_S)
        if line.what == DECODE:
            part = SERVERS[line.part]
            assert (line.count, line.length) in (*part.decode, *part.late_decode)
            for peer in line.peer_parts:
                assert f"{line.count}x{line.length}" in ",".join(PEERS[peer]).split(",")
    assert {*SERVERS, *PEERS, "ready", "gaps"} == set(EXPECTED_S)


def test_a_line_shows_median_spread_share_peers_and_by_how_much_a_target_is_missed() -> None:
    decode = row(DECODE, 1, 128, "tok/s", [236, 240, 242]) | {"share": 0.838}
    text = table({
        "bf16": result(decode, more_options=["--max-rows", "300"]),
        "transformers": result(row(DECODE, 1, 128, "tok/s", [30.0])),
        "transformers-continuous": result(row(DECODE, 1, 128, "tok/s", [41.5])),
        "ready": result(row(READY, 0, 0, "s", [6.0, 7.0, 7.5])),
    })  # fmt: skip
    found = line_of(text, "Llama-3.1-8B bf16, batch 1, 128 context")
    assert found[1:] == ["240 (236 to 242)", "84%", "41.5 ²", "210", "≥ 250", "no, -4.0%"]
    assert line_of(text, "ready, dummy weights, kernels compiled before")[-1] == "yes"
    assert line_of(text, "bf16, batch 8, 128 context")[1] == "not measured"
    assert "bf16 (`--max-rows 300`), transformers, transformers-continuous, ready: 2026-11-24 | C | G" in text


def test_a_note_is_there_for_what_the_table_has() -> None:
    def of(part: str) -> str:
        return table({part: result(row(DECODE, 1, 128, "tok/s", [30.0]))})

    assert "² Continuous batching" in of("transformers-continuous")
    assert "²" not in of("transformers")


def test_what_failed_says_so_in_every_line_that_it_left_open() -> None:
    text = table({"int4": result(row(DECODE, 1, 128, "tok/s", [500.0]), missing(FAILED, 0, 0, "the server | died"))})
    assert line_of(text, "Llama-3.1-8B int4, batch 1, 128 context")[-1] == "no, -16.7%"
    assert line_of(text, "int4, batch 8, 128 context")[1] == "the server / died"


def test_a_failure_is_added_to_the_rows_that_were_saved_before_it(tmp_path: Path) -> None:
    save = tmp_path / "gaps.json"
    save.write_text(json.dumps(result(row(GAP, 1, 128, "us", [12.0]))))
    note_failure("gaps", save, "out of memory")
    assert [each["what"] for each in json.loads(save.read_text())["rows"]] == [GAP, FAILED]


def test_further_records_have_numbers_and_the_newest_comes_last(tmp_path: Path) -> None:
    names = ["fp8.json", *(f"fp8.{number}.json" for number in range(2, 12))]
    assert [save(tmp_path, "fp8") for _ in names] == names
    save(tmp_path, "fp8-kv")
    assert [path.name for path in record_paths(tmp_path, "fp8")] == names


def test_records_are_shown_as_one_by_the_median_of_their_medians_and_all_their_spread(tmp_path: Path) -> None:
    for runs, limit in (([236, 240, 242], 300), ([230, 231, 251], 310), ([239], 320)):
        save(tmp_path, "fp8", row(DECODE, 1, 128, "tok/s", runs) | {"limit": limit, "share": 0.0})
    (found,) = read_results(tmp_path)["fp8"]["rows"]
    assert (found["value"], found["value_low"], found["value_high"]) == (239, 230, 251)
    assert (found["limit"], found["share"]) == (310, 239 / 310)


def test_a_row_that_one_record_has_not_is_that_of_the_others(tmp_path: Path) -> None:
    for part in (row(DECODE, 1, 128, "tok/s", [5.0, 6.0, 8.0]), missing(DECODE, 1, 128, "does not fit")):
        save(tmp_path, "bf16", part)
    assert [each["value"] for each in read_results(tmp_path)["bf16"]["rows"]] == [6.0]


def test_a_field_that_one_record_has_not_is_that_of_the_newest(tmp_path: Path) -> None:
    save(tmp_path, "bf16", row(DECODE, 1, 128, "tok/s", [5.0]))
    save(tmp_path, "bf16", row(DECODE, 1, 128, "tok/s", [7.0]) | {"occupancy_share": 0.9, "limit": 70})
    (found,) = read_results(tmp_path)["bf16"]["rows"]
    assert (found["value"], found["occupancy_share"], found["limit"]) == (6.0, 0.9, 70)


def test_machines_and_dates_of_all_records_are_named(tmp_path: Path) -> None:
    decode = row(DECODE, 1, 1024, "tok/s", [5.0])
    for date in ("2026-11-24", "2026-11-24", "2026-11-29"):
        save(tmp_path, "bf16", decode, machine=MACHINE | {"date": date})
    results = read_results(tmp_path)
    text = table(results)
    assert "bf16 (2 times): 2026-11-24 | C | G" in text
    assert "- bf16: 2026-11-29 | C | G" in text
    assert caption(results).endswith("G; 2026-11-24, 2026-11-29")


def test_records_of_servers_with_other_options_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "bf16", more_options=[])
    save(tmp_path, "bf16", more_options=["--max-rows", "512"])
    with pytest.raises(SystemExit, match=r"bf16.json, bf16.2.json in .* differ in shape or more_options"):
        read_results(tmp_path)


@pytest.mark.parametrize(("again", "left"), [(True, ["bf16.2.json", "bf16.json"]), (False, ["bf16.json"])])
def test_measuring_again_keeps_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool, left: list[str]
) -> None:
    save(tmp_path, "bf16", row(DECODE, 1, 128, "tok/s", [5.0]))
    run = Run(Place(REHEARSED, "", (), tmp_path), tmp_path)
    monkeypatch.setattr(Run, "parts", lambda self: {"bf16": lambda path: path.write_text("{}")})
    run.measure("bf16", again)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == left


def test_a_part_that_is_interrupted_leaves_the_records_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        path.write_text(json.dumps(record(row(READY, 0, 0, "s", [1.0]))))
        raise KeyboardInterrupt

    save(tmp_path, "bf16", row(DECODE, 1, 128, "tok/s", [5.0]))
    monkeypatch.setattr(Run, "parts", lambda self: {"bf16": interrupted})
    with pytest.raises(KeyboardInterrupt):
        Run(Place(REHEARSED, "", (), tmp_path), tmp_path).measure("bf16", False)
    assert [each["what"] for each in read_results(tmp_path)["bf16"]["rows"]] == [DECODE]


def test_the_table_replaces_what_stood_between_its_markers() -> None:
    assert insert(f"a\n{BEGIN}\nold\n{END}\nb", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="needs the two lines"):
        insert("a page without", "new")
    insert((ROOT / "docs" / "performance.md").read_text(), "")


def test_idle_before_a_step_is_from_the_end_of_the_last_kernel_and_copies_do_not_end_it() -> None:
    spans = [
        Span("_inputs_kernel", 0, 2), Span("gemm", 2, 10), Span("Memcpy HtoD", 11, 12), Span("_inputs_kernel", 14, 15),
        Span("gemm", 15, 30), Span("side", 16, 18), Span("_inputs_kernel", 30, 31),
    ]  # fmt: skip
    assert idle_before_steps(spans) == [4.0, 0.0]
    assert busy_us(spans) == 28.0


def test_gpu_memory_is_a_leak_only_if_it_grows_with_every_kill() -> None:
    assert not leak([284 << 20, 0, -1])
    assert not leak([1, 1, 1])
    assert "+284, +300 MiB" in leak([284 << 20, 300 << 20])[0]


def test_sizes_are_read_as_they_are_written() -> None:
    assert sizes(size_text(((32, 1024), (4, 8192)))) == ((32, 1024), (4, 8192))


def test_windows_count_what_arrives_after_the_first() -> None:
    assert window_rates([(1.0, 8), (2.0, 8), (3.0, 8), (3.5, 8), (4.0, 8)], 2) == [8.0, 16.0]
    with pytest.raises(ValueError, match="cannot be cut"):
        window_rates([(1.0, 8)], 1)


def test_the_picture_has_a_line_per_engine_and_the_limit_of_those_that_know_it() -> None:
    def curve(*limits: float) -> dict[str, Any]:
        return result(
            *(row(DECODE, 4**i, 1024, "tok/s", [9.0, 10.0]) | {"limit": each} for i, each in enumerate(limits))
        )

    lines = lines_of({"bf16": curve(100, 200), "transformers": result(row(DECODE, 1, 1024, "tok/s", [3.0]))})
    assert [line.name for line in lines if line.is_limit] == ["limit of mgpu bf16"]
    assert [len(line.points) for line in lines] == [2, 1, 2, 2]
    assert not lines_of({"bf16": result(missing(DECODE, 1, 1024, "does not fit"))})
