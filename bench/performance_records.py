"""What `bench/performance.py` saved: a file per part and, for parts that were measured again, further ones beside it.

``bf16.json`` and ``bf16.2.json`` are two records of the part bf16. The table shows their runs together. Three runs make
a record (`performance_rows.REAL`), so that least, median and greatest are all of them.
"""

import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from mgpu.launch.bench.machine import heading
from mgpu.launch.bench.summary import spread

Result = dict[str, Any]
Results = dict[str, Result]


def record_paths(folder: Path, part: str) -> list[Path]:
    """List the records of one part."""
    return sorted(path for path in folder.glob(f"{part}.*") if path.suffix == ".json" and part_of(path) == part)


def next_path(folder: Path, part: str) -> Path:
    """Give a name for a further record, or for the first."""
    names = (folder / (f"{part}.json" if number == 1 else f"{part}.{number}.json") for number in count(1))
    return next(path for path in names if not path.exists())


def part_of(path: Path) -> str:
    return path.name.partition(".")[0]


def read_results(folder: Path) -> Results:
    """Read what each part saved. SystemExit when there is nothing."""
    found: dict[str, list[Result]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        found[part_of(path)].append(json.loads(path.read_text()))
    if not found:
        raise SystemExit(f"error: no results in {folder}; measure first: python bench/performance.py --only bf16")
    return {part: pooled(records) for part, records in found.items()}


def pooled(records: Sequence[Result]) -> Result:
    """Make one result of all records of a part, which keeps the machines of all."""
    rows: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for record in records:
        for row in record["rows"]:
            rows[row["what"], row["count"], row["length"]].append(row)
    machines = [record["machine"] for record in records]
    return {**records[-1], "machines": machines, "rows": [_together(same) for same in rows.values()]}


def _together(rows: Sequence[Result]) -> Result:
    """Make one row of what several records have of the same thing, as if its runs were of one."""
    known = [row for row in rows if "value" in row] or rows
    if len(known) == 1:
        return known[0]
    together = dict(known[-1])
    for name in known[-1]:
        if f"{name}_low" in known[-1]:
            together.update(spread(name, [row[name + end] for row in known for end in ("", "_low", "_high")]))
    if together.get("limit"):
        together["limit"] = statistics.median(row["limit"] for row in known)
        together["share"] = together["value"] / together["limit"]
    return together


def machine_lines(results: Iterable[tuple[str, Result]]) -> list[str]:
    """List machines and versions, each with the parts that ran there; options of the server that are not the part's."""
    parts: dict[str, list[str]] = {}
    for name, result in results:
        more = " ".join(result.get("more_options", []))
        shown = f"{name} (`{more}`)" if more else name
        machines = result.get("machines", [result["machine"]])
        for machine, times in Counter(map(heading, machines)).items():
            parts.setdefault(machine, []).append(shown if times == 1 else f"{shown} ({times} times)")
    return [f"{', '.join(names)}: {where}" for where, names in parts.items()]
