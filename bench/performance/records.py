"""What `bench/performance` saved: a file per part and, for parts that were measured again, further ones beside it.

``bf16.json`` and ``bf16.2.json`` are two records of the part bf16, the second one newer. The table shows the median of
the medians of all records of a part, and the least and the greatest run of all.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import count, takewhile
from pathlib import Path
from statistics import median
from typing import Any

from mgpu.launch.bench.report import heading

Result = dict[str, Any]
Results = dict[str, Result]

SHOWN_FIELDS = ("value", "occupancy_share")
"""What the table shows of a row, each beside its least and greatest as ``_low`` and ``_high``."""
ALIKE = ("shape", "more_options")
"""What records must agree in to be shown as one."""


def record_paths(folder: Path, part: str) -> list[Path]:
    """List the records of one part, the oldest first."""
    return list(takewhile(Path.exists, _names(folder, part)))


def next_path(folder: Path, part: str) -> Path:
    """Return a name for a further record, or for the first."""
    return next(path for path in _names(folder, part) if not path.exists())


def _names(folder: Path, part: str) -> Iterable[Path]:
    return (folder / (f"{part}.json" if number == 1 else f"{part}.{number}.json") for number in count(1))


def read_results(folder: Path) -> Results:
    """Read what each part saved. SystemExit when there is nothing, or when records cannot be shown as one."""
    parts = sorted({path.name.partition(".")[0] for path in folder.glob("*.json")})
    if not parts:
        raise SystemExit(f"error: no results in {folder}; measure first: python -m bench.performance --only bf16")
    results = {}
    for part in parts:
        paths = record_paths(folder, part)
        records = [json.loads(path.read_text()) for path in paths]
        if any(record.get(name) != records[0].get(name) for record in records for name in ALIKE):
            names = ", ".join(path.name for path in paths)
            raise SystemExit(f"error: {names} in {folder} differ in {' or '.join(ALIKE)}; remove all but one kind")
        results[part] = together(records)
    return results


def together(records: Sequence[Result]) -> Result:
    """Make one result of all records of a part. What it says apart from its rows is what the newest one says."""
    rows: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for record in records:
        for row in record["rows"]:
            rows[row["what"], row["count"], row["length"]].append(row)
    machines = [record["machine"] for record in records]
    return {**records[-1], "machines": machines, "rows": [_one_row(same) for same in rows.values()]}


def _one_row(rows: Sequence[Result]) -> Result:
    """Make one row of what several records have of the same thing."""
    known = [row for row in rows if "value" in row]
    if len(known) < 2:
        return (known or list(rows))[-1]
    one = dict(known[-1])
    for name in SHOWN_FIELDS:
        if all(name in row for row in known):
            one[name] = median(row[name] for row in known)
            one[f"{name}_low"] = min(row[f"{name}_low"] for row in known)
            one[f"{name}_high"] = max(row[f"{name}_high"] for row in known)
    if all(row.get("limit") for row in known):
        one["limit"] = median(row["limit"] for row in known)
        one["share"] = one["value"] / one["limit"]
    return one


def machine_lines(results: Iterable[tuple[str, Result]]) -> list[str]:
    """List machines and versions, each with the parts that ran there; options of the server that are not the part's."""
    parts: dict[str, list[str]] = {}
    for name, result in results:
        more = " ".join(result.get("more_options", []))
        shown = f"{name} (`{more}`)" if more else name
        for machine, times in Counter(map(heading, result["machines"])).items():
            parts.setdefault(machine, []).append(shown if times == 1 else f"{shown} ({times} times)")
    return [f"{', '.join(names)}: {where}" for where, names in parts.items()]
