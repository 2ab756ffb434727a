"""Collect the rows of `multi_gpu.py`: printed as they come, saved after each, so that no interruption loses any."""

import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.report import Table

Verdict = Literal["ok", "FAIL", "met", "missed", "measured", "rehearsed", "skipped"]
_WIDTHS = (11, 54, 34, 34)
_MOST = 140


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what was asked, what must be, what was."""

    section: str
    asked: str
    wanted: str
    found: str
    verdict: Verdict
    value: float | None = None
    """The number in ``found``, for programs."""
    unit: str = ""
    details: str = ""
    """More than fits the table, such as a traceback; in the JSON only."""

    @property
    def is_good(self) -> bool:
        return self.verdict not in ("FAIL", "missed")

    @property
    def line(self) -> str:
        found = self.found if len(self.found) <= _MOST else self.found[: _MOST - 1] + "…"
        cells = (self.section, self.asked, self.wanted, found)
        return " | ".join([*(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)), self.verdict])


class Report(Table[Row]):
    """The table. ``rehearsal`` withholds every verdict about speed."""

    def __init__(self, machine: dict[str, object], path: Path | None, rehearsal: bool, budget_s: float) -> None:
        super().__init__(path, machine)
        self.rehearsal = rehearsal
        self.budget_s = budget_s
        self._began_s = time.monotonic()

    @property
    def facts(self) -> dict[str, object]:
        return {"rehearsal": self.rehearsal, "seconds": self.seconds()}

    def heading(self) -> str:
        cells = ("section", "asked", "must be", "was")
        titles = " | ".join([*(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)), "verdict"])
        return f"{titles}\n{'-' * len(titles)}"

    def check(self, section: str, asked: str, wanted: str, found: str, good: bool, details: str = "") -> None:
        self.add(Row(section, asked, wanted, found, "ok" if good else "FAIL", details="" if good else details))

    def note(self, section: str, asked: str, found: str) -> None:
        """Add something seen that nothing was expected of."""
        self.add(Row(section, asked, "-", found, "rehearsed" if self.rehearsal else "measured"))

    def number(
        self,
        section: str,
        asked: str,
        value: float,
        unit: str,
        *,
        least: float | None = None,
        most: float | None = None,
        details: str = "",
    ) -> None:
        """Add a measured number, against what it must at least or at most be, if that is known."""
        met = (least is None or value >= least) and (most is None or value <= most)
        verdict: Verdict = "measured" if least is None and most is None else "met" if met else "missed"
        wanted = f">= {least:g} {unit}" if least is not None else f"<= {most:g} {unit}" if most is not None else "-"
        found = f"{value:,.1f} {unit}"
        self.add(Row(section, asked, wanted, found, "rehearsed" if self.rehearsal else verdict, value, unit, details))

    def skip(self, section: str, asked: str, why: str) -> None:
        self.add(Row(section, asked, "-", why, "skipped"))

    def seconds(self) -> float:
        return round(time.monotonic() - self._began_s, 1)

    def has_time(self, section: str, asked: str) -> bool:
        """Tell whether the budget lasts; a row says so where it does not."""
        if time.monotonic() - self._began_s < self.budget_s:
            return True
        self.skip(section, asked, f"the {self.budget_s:g} s of --budget are over")
        return False

    @contextmanager
    def guard(self, section: str, asked: str, wanted: str = "-") -> Iterator[None]:
        """Turn whatever a measurement raises into a row: time on such a machine is short, and others must still run."""
        try:
            yield
        except Exception as error:
            self.add(Row(section, asked, wanted, _gist(error), "FAIL", details=_text(error)))

    def summary(self) -> str:
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.verdict] = counts.get(row.verdict, 0) + 1
        return f"{len(self.rows)} rows in {self.seconds():g} s: " + ", ".join(f"{n} {v}" for v, n in counts.items())


def _gist(error: BaseException) -> str:
    """Return the first line of an error and, if the text has a log, the last line of it that names an error."""
    first, *rest = str(error).strip().splitlines() or ["no message"]
    causes = [line.strip() for line in rest if re.search("error|failed|died", line, re.IGNORECASE)]
    return f"{type(error).__name__}: {first}" + (f" [{causes[-1][:160]}]" if causes else "")


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-8000:]
