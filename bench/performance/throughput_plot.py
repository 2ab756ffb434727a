"""The picture of docs/performance.md: tokens per second against concurrency, of what `bench/performance` saved."""

import os
from pathlib import Path

from bench.performance.chart import Line, Point, draw
from bench.performance.records import Result, Results
from bench.performance.rows import DECODE
from bench.performance.table import CONTINUOUS, GENERATE, write_between

CONTEXT = 1024
ENGINES = {
    "bf16": "mgpu bf16",
    "fp8": "mgpu fp8",
    GENERATE: "transformers bf16, generate",
    CONTINUOUS: "transformers bf16, continuous",
}
"""Parts that are drawn, in the order of the legend."""
ALT = "Tokens per second against concurrent requests: mgpu, its limit, transformers, vLLM and SGLang"
PEERS = Line("vLLM, SGLang bf16 (the better)", [Point(64, 8400, 8400, 8400), Point(256, 14256, 14256, 14256)])


def write_picture(results: Results, picture: Path, readme: Path) -> None:
    """Draw results, and show the picture in the README. SystemExit when nothing of them can be drawn."""
    lines = lines_of(results)
    if not lines:
        raise SystemExit(f"error: no decoding behind {CONTEXT:,} tokens was measured; measure the part bf16 first")
    picture.write_text(draw(lines, caption(results)))
    where = Path(os.path.relpath(picture, readme.parent)).as_posix()
    write_between(readme, f"![{ALT}]({where})\n")
    print(f"drew {', '.join(line.name for line in lines)} in {picture}")


def lines_of(results: Results) -> list[Line]:
    """Return a line per engine that was measured, and one per limit."""
    lines, limits = [], []
    for part, name in ENGINES.items():
        rows = _rows(results.get(part, {}))
        if rows:
            lines.append(Line(name, [_point(row, "value") for row in rows]))
        if rows and all(row.get("limit") for row in rows):
            limits.append(Line(f"limit of {name}", [_limit(row) for row in rows], is_limit=True, limit_of=name))
    return [*lines, PEERS, *limits] if lines else []


def _rows(result: Result) -> list[Result]:
    rows = [row for row in result.get("rows", []) if (row["what"], row["length"]) == (DECODE, CONTEXT)]
    return sorted((row for row in rows if row.get("value")), key=lambda row: row["count"])


def _point(row: Result, name: str) -> Point:
    return Point(row["count"], row[name], row[f"{name}_low"], row[f"{name}_high"])


def _limit(row: Result) -> Point:
    return Point(row["count"], row["limit"], row["limit"], row["limit"])


def caption(results: Results) -> str:
    """Say what was measured, where and when; machines are those of the first engine that is drawn."""
    drawn = [results[part] for part in ENGINES if part in results]
    machine = drawn[0]["machines"][-1]
    where = ", ".join(dict.fromkeys(machine["gpus"])) or machine["cpu"]
    dates = sorted({machine["date"] for result in drawn for machine in result["machines"]})
    return f"Llama-3.1-8B, decoding behind prompts of {CONTEXT:,} tokens; {where}; {', '.join(dates)}"
