"""What a benchmark found: printed as it comes, kept as JSON or CSV with what must stand beside it."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import click

from mgpu.launch.bench.machine import describe, heading
from mgpu.launch.bench.summary import Row, Value
from mgpu.orchestrator.errors import UserError

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
            self._save.parent.mkdir(parents=True, exist_ok=True)
            if self._save.suffix == ".csv":
                self._write_csv(self._save)
            else:
                whole = {**self._facts, "machine": self._machine, "rows": self._rows}
                self._save.write_text(json.dumps(whole, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--save {self._save}: {error.strerror}; choose another place") from error

    def _write_csv(self, path: Path) -> None:
        """Repeat the facts in every line, so that lines of several files can be put together."""
        facts = {name: value for name, value in self._facts.items() if not isinstance(value, (dict, list, tuple))}
        facts |= {"measured_on": heading(self._machine)}
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*facts, *names])
            writer.writeheader()
            writer.writerows({**facts, **row} for row in self._rows)


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
