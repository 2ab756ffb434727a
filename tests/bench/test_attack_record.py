"""The record of attacks, and the tables that are made from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.attack import record
from bench.attack.row import Row
from bench.performance.table import insert

NO = record.NOT_RUN
MACHINE = {"date": "2026-11-30", "cpu": "a CPU, 2 cores", "gpus": [], "versions": {"pyzmq": "27.3"}}
HOSTILE = dict.fromkeys(record.HOSTILE_KEPT, 0) | {"transport": "tcp", "of_character": {}, "worst_first_token_s": 1.5}


def save(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"machine": MACHINE, "rows": rows}))
    return path


def attack(**values: Any) -> dict[str, Any]:
    return vars(Row("questions", "ipc", 4, **{"first_token_ratio": 1.25, "rate_ratio": 0.91, **values}))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setattr(record, "RECORD", tmp_path / "kept" / "record.json")
    return record.read()


def line_of(kept: dict[str, Any], begin: str) -> str:
    return next(line for line in record.tables(kept).splitlines() if line.startswith(begin))


def test_a_row_replaces_an_earlier_one_of_the_same_case(kept: dict[str, Any], tmp_path: Path) -> None:
    record.add(kept, save(tmp_path / "1.json", attack(rate_ratio=0.5)), "aaa")
    assert line_of(kept, "| `questions`") == f"| `questions` | {NO} | **1.2 / 0.50** | {NO} | {NO} |"
    record.add(kept, save(tmp_path / "2.json", attack()), "bbb")
    assert line_of(kept, "| `questions`") == f"| `questions` | {NO} | 1.2 / 0.91 | {NO} | {NO} |"


def test_a_row_that_keeps_descriptors_says_so(kept: dict[str, Any], tmp_path: Path) -> None:
    record.add(kept, save(tmp_path / "1.json", attack(grown_descriptors=6)), "aaa")
    assert line_of(kept, "| `questions`") == f"| `questions` | {NO} | **1.2 / 0.91**, descriptors kept | {NO} | {NO} |"


def test_sessions_and_fuzzing_of_all_runs_are_added_up(kept: dict[str, Any], tmp_path: Path) -> None:
    fuzz = {"target": "wire", "cpu_s": 90.0, "inputs": 1000, "edges": 1, "corpus": 1, "findings": []}
    for number in range(2):
        record.add(kept, save(tmp_path / f"{number}.json", HOSTILE | {"sessions": 25_000}, fuzz), "aaa")
    assert line_of(kept, "| tcp").startswith("| tcp | 2 | 50,000 |")
    assert line_of(kept, "| `wire`") == "| `wire` | 3.0 | 2,000 | 0 |"


def test_what_is_saved_is_read_again(kept: dict[str, Any], tmp_path: Path) -> None:
    record.add(kept, save(tmp_path / "1.json", attack(), HOSTILE), "aaa")
    record.write(kept)
    assert record.read() == kept


def test_the_page_has_what_the_record_says() -> None:
    page = record.PAGE.read_text()
    assert insert(page, record.tables(record.read()), record.MARKERS) == page, "run python -m bench.attack.record"
