"""The table of the fault tests: what each row counts, and how it is printed and kept."""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.chaos.load import Tally
from bench.report import Table

HEADING = """| fault | injections | streams finished | tokens | lost | repeated | different | s, median / worst | good |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


@dataclass
class Row:
    """One line of the table."""

    fault: str
    injections: int = 0
    finished: int = 0
    tokens: int = 0
    lost: int = 0
    repeated: int = 0
    different: int = 0
    seconds: list[float] = field(default_factory=list)
    """Per injection: until everything was well again."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Said below the table."""

    def add(self, tally: Tally) -> None:
        """Take over what the streams counted."""
        for name in ("finished", "tokens", "lost", "repeated", "different"):
            setattr(self, name, getattr(self, name) + getattr(tally, name))
        self.problems += tally.problems

    def injected(self, seconds: float | None = None, count: int = 1) -> None:
        """Count an injection and show that the program is alive."""
        self.injections += count
        if seconds is not None:
            self.seconds.append(seconds)
        took = f"{seconds:.2f} s" if seconds is not None else ""
        print(f"{time.strftime('%H:%M:%S')} {self.fault}: {self.injections} {took}", file=sys.stderr, flush=True)

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.repeated or self.different or self.problems)

    @property
    def line(self) -> str:
        seconds = sorted(self.seconds)
        times = f"{statistics.median(seconds):.2f} / {seconds[-1]:.2f}" if seconds else "-"
        numbers = (self.injections, self.finished, self.tokens, self.lost, self.repeated, self.different)
        good = "yes" if self.is_good else "NO"
        return f"| {self.fault} | {' | '.join(map(str, numbers))} | {times} | {good} |"


class Report(Table[Row]):
    """Rows in a folder: ``chaos.json`` and, as it was printed, ``chaos.txt``."""

    def __init__(self, folder: Path, machine: dict[str, object], title: str) -> None:
        super().__init__(folder / "chaos.json", machine)
        self._text = ""
        self._text_path = folder / "chaos.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self.say(f"{title}\n\n{HEADING}")

    def add(self, row: Row) -> None:
        super().add(row)
        for problem in row.problems[:10]:
            self.say(f"    {problem}")

    def close(self) -> None:
        """Print what does not fit into a table."""
        for row in self.rows:
            if row.notes:
                self.say("\n".join(["", f"{row.fault}:", *row.notes]))

    def say(self, text: str) -> None:
        super().say(text)
        self._text += text + "\n"
        self._text_path.write_text(self._text)
