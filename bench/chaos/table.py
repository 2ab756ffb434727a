"""The table of the fault tests: what each row counts, and how it is printed and kept."""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.chaos.load import Tally

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


class Report:
    """Print rows as they come, and keep them in a folder, so that a run that is cut short is not lost."""

    def __init__(self, folder: Path, machine: dict[str, object], title: str) -> None:
        self.rows: list[Row] = []
        self._folder = folder
        self._machine = machine
        self._text = ""
        folder.mkdir(parents=True, exist_ok=True)
        self._say(f"{title}\n\n{HEADING}")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._say(row.line)
        for problem in row.problems[:10]:
            self._say(f"    {problem}")
        data = {"machine": self._machine, "rows": [asdict(each) for each in self.rows]}
        (self._folder / "chaos.json").write_text(json.dumps(data, indent=1))

    def close(self) -> None:
        """Say what does not fit into a table."""
        for row in self.rows:
            if row.notes:
                self._say("\n".join(["", f"{row.fault}:", *row.notes]))

    def _say(self, text: str) -> None:
        print(text, flush=True)
        self._text += text + "\n"
        (self._folder / "chaos.txt").write_text(self._text)
