"""Benches of a worker's steps keep the rates that they print."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import quantized, step
from bench.performance.rows import STEP

US = {1: 100.0, 8: 200.0}
"""A step of so many rows."""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def saved_rows(save: Path) -> list[dict[str, object]]:
    return list(json.loads(save.read_text())["rows"])


def test_rates_are_saved_without_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runner = SimpleNamespace(warm_up=lambda tokens, seed: None)
    monkeypatch.setattr(step, "make_runner", lambda *arguments: runner)
    monkeypatch.setattr(step, "fill", lambda runner, rows, context: 1.0)
    monkeypatch.setattr(step, "decode", lambda runner, rows, start, steps: (US[rows], 10.0))
    save = tmp_path / "step.json"
    monkeypatch.setattr("sys.argv", ["step", "--quant", "4", "--rows", "1,8", "--top", "0", "--save", str(save)])
    step.main()
    assert [(row["what"], row["count"], row["format"], row["value"]) for row in saved_rows(save)] == [
        (STEP, 1, "4", pytest.approx(10_000)),
        (STEP, 8, "4", pytest.approx(40_000)),
    ]


def test_formats_are_compared_with_bfloat16_at_every_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speed = {"none": 1.0, "4": 2.0, "GPTQ": 0.5}
    monkeypatch.setattr(
        quantized, "measure", lambda shape, form, counts, *_: {rows: [US[rows] / speed[form]] for rows in counts}
    )
    save = tmp_path / "quantized.json"
    monkeypatch.setattr("sys.argv", ["quantized", "--formats", "4,GPTQ", "--rows", "1,8", "--save", str(save)])
    quantized.main()
    assert [(row["format"], row["count"], row["share"]) for row in saved_rows(save)] == [
        (form, rows, pytest.approx(speed[form])) for form in speed for rows in US
    ]


def test_an_unknown_format_is_refused_with_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["quantized", "--formats", "4,int3"])
    with pytest.raises(SystemExit):
        quantized.main()
    assert "unknown formats: int3; known are none, 8, 4, fp8, GPTQ" in capsys.readouterr().err
