"""The plot: every measured point and the limit are drawn, on a scale that holds them all."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.performance.chart import draw, read_lines, scale_of, ticks

SVG = "{http://www.w3.org/2000/svg}"


def result(path: Path, engine: str, rates: list[float], limit: float | None) -> Path:
    rows = [
        {"load": "closed", "level": 2**i, "tokens_per_s": rate, "tokens_per_s_low": rate / 2, "tokens_per_s_high": rate}
        | ({"limit": limit} if limit else {})
        for i, rate in enumerate(rates)
    ]
    path.write_text(json.dumps({"engine": engine, "dtype": "float32", "rows": [*rows, {"load": "poisson"}]}))
    return path


def test_every_point_is_drawn_and_the_limit_is_a_line_without_points(tmp_path: Path) -> None:
    lines = read_lines(result(tmp_path / "a", "mgpu", [10, 20, 35], 500))
    lines += read_lines(result(tmp_path / "b", "a <peer> & co", [5, 9], None))
    assert [(line.name, line.is_limit, len(line.points)) for line in lines] == [
        ("mgpu (float32)", False, 3),
        ("memory limit", True, 3),
        ("a <peer> & co (float32)", False, 2),
    ]
    picture = ElementTree.fromstring(draw(lines, "what & where"))
    assert len(picture.findall(f"{SVG}circle")) == 5
    assert sum("stroke-dasharray" in path.attrib for path in picture.findall(f"{SVG}path")) == 2
    assert "a <peer> & co (float32)" in [text.text for text in picture.findall(f"{SVG}text")]


def test_the_scale_holds_all_points_between_round_numbers(tmp_path: Path) -> None:
    scale = scale_of(read_lines(result(tmp_path / "a", "mgpu", [100, 730], None)))
    assert (scale.low, scale.high, scale.most_clients) == (50, 1000, 2)
    assert scale.y(50) > scale.y(730) > scale.y(1000)
    assert ticks(50, 1000) == [50, 100, 200, 500, 1000]


def test_one_concurrency_alone_can_be_drawn(tmp_path: Path) -> None:
    ElementTree.fromstring(draw(read_lines(result(tmp_path / "a", "mgpu", [10], None)), ""))


def test_a_result_without_closed_loops_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no rows of closed loops"):
        read_lines(result(tmp_path / "a", "mgpu", [], None))
