"""Keep what runs of `make attack` have shown in one record, and write the tables of docs/security.md from it.

    python -m bench.attack.record --commit ID FILE…     # attack.json, hostile.json and fuzz.json of runs at that commit
    python -m bench.attack.record                       # only write the page again

A row replaces an earlier one of the same attack, transport and strength. Hostile sessions and minutes of fuzzing are
kept from all runs.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.attack.attacks import ATTACKS
from bench.attack.row import LEAST_RATE, MOST_FIRST_TOKEN, Row
from bench.performance.table import write_between
from mgpu.launch.bench.report import heading

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "bench" / "results" / "attack" / "record.json", ROOT / "docs" / "security.md"
MARKERS = ("<!-- bench.attack.record: begin -->", "<!-- bench.attack.record: end -->")
KEPT = (
    "attack", "transport", "strength", "first_token_ratio", "rate_ratio", "gateways", "counted_restarts", "lost",
    "different", "log_bytes_per_s", "grown_bytes", "grown_descriptors",
)  # fmt: skip
HOSTILE_KEPT = (
    "transport", "seed", "sessions", "seconds", "honest_answers", "lost", "different", "never_ended", "gateways",
    "counted_restarts", "worst_first_token_s", "grown_bytes", "grown_descriptors", "log_bytes_per_s",
)  # fmt: skip
CASES = (("ipc", 1), ("ipc", 4), ("tcp", 1), ("tcp", 4))
NOT_RUN = "\N{EN DASH}"


def read() -> dict[str, Any]:
    if RECORD.exists():
        found: dict[str, Any] = json.loads(RECORD.read_text())
        return found
    return {"runs": {}, "attacks": [], "hostile": [], "fuzz": []}


def add(record: dict[str, Any], file: Path, commit: str) -> None:
    """Take the rows of a file into the record."""
    saved = json.loads(file.read_text())
    run = f"{commit} | {heading(saved['machine'])}"
    number = record["runs"].setdefault(run, len(record["runs"]))
    for row in saved["rows"]:
        if "attack" in row:
            key = [row[name] for name in KEPT[:3]]
            record["attacks"] = [each for each in record["attacks"] if each[:3] != key]
            record["attacks"].append([*(_short(row[name]) for name in KEPT), number])
        elif "of_character" in row:
            record["hostile"].append([*(_short(row[name]) for name in HOSTILE_KEPT), number])
        else:
            record["fuzz"].append([row["target"], _short(row["cpu_s"]), row["inputs"], len(row["findings"]), number])
    record["attacks"].sort()


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def write(record: dict[str, Any]) -> None:
    """Save the record, a row a line."""
    parts = []
    for name, value in record.items():
        if isinstance(value, dict):
            parts.append(f"{json.dumps(name)}: {json.dumps(value, indent=1)}")
        else:
            lines = ",\n".join(json.dumps(row) for row in value)
            parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def tables(record: dict[str, Any]) -> str:
    """Return the tables of the page."""
    runs = "".join(f"- {run}\n" for run in record["runs"])
    return f"{_attacks(record)}\n{_hostile(record)}\n{_fuzzing(record)}\nCommits and machines of these runs:\n\n{runs}"


def _attacks(record: dict[str, Any]) -> str:
    rows = [_row_of(values) for values in record["attacks"]]
    found = {(row.attack, row.transport, row.strength): row for row in rows}
    lines = ["| attack | " + " | ".join(f"{transport} x {strength}" for transport, strength in CASES) + " |"]
    lines.append("|" + " --- |" * (1 + len(CASES)))
    lines += [
        f"| `{name}` | " + " | ".join(_cell(found.get((name, *case))) for case in CASES) + " |" for name in ATTACKS
    ]
    good = sum(row.is_good for row in rows)
    largest = max((row.log_bytes_per_s for row in rows), default=0.0)
    summary = (
        f"{good} of {len(rows)} rows are good; {len(ATTACKS) * len(CASES) - len(rows)} were not run. In all of them: "
        f"{sum(row.lost for row in rows)} streams lost, {sum(row.different for row in rows)} different, "
        f"{sum(row.counted_restarts for row in rows)} restarts counted, {sum(row.gateways for row in rows)} gateways "
        f"replaced, at most {largest:.0f} B/s of log."
    )
    return "\n".join(lines) + f"\n\n{summary}\n"


def _row_of(values: list[Any]) -> Row:
    row = Row(**dict(zip(KEPT, values, strict=False)))
    row.judge()
    return row


def _cell(row: Row | None) -> str:
    if row is None:
        return NOT_RUN
    text = f"{row.first_token_ratio:.1f} / {row.rate_ratio:.2f}"
    if row.is_good:
        return text
    is_slow = row.first_token_ratio > MOST_FIRST_TOKEN or row.rate_ratio < LEAST_RATE
    return f"**{text}**" if is_slow else f"**{text}**, {row.problems[0].partition(':')[0]}"


def _hostile(record: dict[str, Any]) -> str:
    lines = [
        "| hostile sessions | runs | sessions | min | honest answers | lost, different, never ended "
        "| gateways, counted | worst first token | MiB, descriptors more |",
        "|" + " --- |" * 9,
    ]
    for transport in ("ipc", "tcp"):
        rows = [dict(zip(HOSTILE_KEPT, each, strict=False)) for each in record["hostile"] if each[0] == transport]
        if not rows:
            continue
        lines.append(
            f"| {transport} | {len(rows)} | {_sum(rows, 'sessions'):,} | {_sum(rows, 'seconds') / 60:.1f} | "
            f"{_sum(rows, 'honest_answers'):,} | {_sum(rows, 'lost')}, {_sum(rows, 'different')}, "
            f"{_sum(rows, 'never_ended')} | {_sum(rows, 'gateways')}, {_sum(rows, 'counted_restarts')} | "
            f"{max(row['worst_first_token_s'] for row in rows):.1f} s | "
            f"{max(row['grown_bytes'] for row in rows) >> 20}, {max(row['grown_descriptors'] for row in rows)} |"
        )
    return "\n".join(lines) + "\n"


def _sum(rows: Iterable[dict[str, Any]], name: str) -> Any:
    return sum(row[name] for row in rows)


def _fuzzing(record: dict[str, Any]) -> str:
    lines = ["| fuzzed | CPU minutes | inputs | findings |", "| --- | --- | --- | --- |"]
    for target in sorted({each[0] for each in record["fuzz"]}):
        rows = [each for each in record["fuzz"] if each[0] == target]
        seconds, inputs, findings = (sum(each[at] for each in rows) for at in (1, 2, 3))
        lines.append(f"| `{target}` | {seconds / 60:.1f} | {inputs:,} | {findings} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--commit", default="", help="of the code that ran")
    options = parser.parse_args()
    if options.files and not options.commit:
        parser.error("--commit is missing: of which code are these rows?")
    record = read()
    for file in options.files:
        add(record, file, options.commit)
    write(record)
    write_between(PAGE, tables(record), MARKERS)


if __name__ == "__main__":
    main()
