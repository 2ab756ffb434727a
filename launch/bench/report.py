"""What a benchmark found: rows of numbers, printed as they come, saved as JSON or CSV beside machine and versions."""

import contextlib
import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

import mgpu
from mgpu.orchestrator.errors import UserError

Value = str | int | float | None
Row = dict[str, Value]
"""One line of a result: names with units, and what was found; None where nothing can be said."""
_WIDTH = 11


class Report:
    """Rows of one benchmark of one engine. Columns that are not ``shown`` are only saved."""

    def __init__(
        self, bench: str, engine: str, shown: Sequence[str], save: Path | None, *packages: str, **facts: object
    ) -> None:
        """Print what stands above the table. ``facts`` and the versions of ``packages`` are saved beside the rows.

        What is there is in ``save`` after every row, as CSV if it is named so, else as JSON. UserError at once when it
        cannot be written.
        """
        self._shown = shown
        self._save = save
        self._rows: list[Row] = []
        self._facts = {"bench": bench, "engine": engine, **facts}
        self._machine = describe(*packages)
        self._write()
        click.echo(heading(self._machine))
        click.echo("".join(f"  {name:>{max(_WIDTH, len(name))}}" for name in shown))

    def add(self, row: Row) -> None:
        """Keep a row and print it."""
        self._rows.append(row)
        self._write()
        cells = (f"  {cell(name, row.get(name)):>{max(_WIDTH, len(name))}}" for name in self._shown)
        note = f"  {row['note']}" if row.get("note") else ""
        click.echo("".join(cells) + note)

    def _write(self) -> None:
        if self._save is None:
            return
        try:
            if self._save.suffix == ".csv":
                self._write_csv(self._save)
            else:
                save_json(self._save, {**self._facts, "machine": self._machine, "rows": self._rows})
        except OSError as error:
            raise UserError(f"--save {self._save}: {error.strerror}; choose another place") from error

    def _write_csv(self, path: Path) -> None:
        """Repeat the facts in every line, so that lines of several files can be put together."""
        facts = {name: value for name, value in self._facts.items() if not isinstance(value, (dict, list, tuple))}
        facts |= {"measured_on": heading(self._machine)}
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*facts, *names])
            writer.writeheader()
            writer.writerows({**facts, **row} for row in self._rows)


def save_json(path: Path, whole: object) -> None:
    """Write a record in place of the last one, whole or not at all. OSError where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n")
    partial.replace(path)


def cell(name: str, value: Value) -> str:
    """Write one value as a table shows it: shares in percent, numbers with three or four significant digits."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    if "share" in name:
        return f"{value:.1%}" if value >= 0.1 else f"{value:.2%}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


def spread(name: str, values: Sequence[float]) -> Row:
    """Return the median under ``name``, and beside it the least and the greatest. ValueError without values."""
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the least value that ``percent`` of all values do not exceed (nearest rank); None without values."""
    if not values:
        return None
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return sorted(values)[rank - 1]


def cpu_name() -> str:
    """Return the name that the kernel prints for the first core."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """List the GPUs of this machine, visible or not; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.SubprocessError):
        return []


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of mgpu, which need not be installed, and of those packages that are."""
    found = {"python": platform.python_version(), "mgpu": mgpu.__version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe(*packages: str) -> dict[str, object]:
    """Return the facts that belong to every number: date, machine, its load just before, versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "gpus": gpu_names(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions("torch", *packages),
    }


def heading(facts: dict[str, object]) -> str:
    """Return the facts of `describe` as one line."""
    versions_text = ", ".join(f"{name} {version}" for name, version in dict(facts["versions"]).items())  # type: ignore[call-overload]
    gpus = ", ".join(facts["gpus"]) or "no GPU"  # type: ignore[arg-type]
    return f"{facts['date']} | {facts['cpu']} | {gpus} | {versions_text}"
