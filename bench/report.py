"""Rows of a benchmark that ends with a verdict: printed as they come, saved after each, so that none is lost."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from mgpu.launch.bench.report import save_json


class Row(Protocol):
    """One line of a table: a dataclass that can say itself."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def line(self) -> str: ...

    @property
    def is_good(self) -> bool: ...


R = TypeVar("R", bound=Row)


class Table(Generic[R]):
    """Rows of one benchmark. ``path`` holds machine and rows as JSON after every row, None: nothing is saved."""

    def __init__(self, path: Path | None, machine: dict[str, object]) -> None:
        self.path = path
        self.machine = machine
        self.rows: list[R] = []

    @property
    def facts(self) -> dict[str, object]:
        """What is saved beside the rows."""
        return {}

    @property
    def is_good(self) -> bool:
        return all(row.is_good for row in self.rows)

    def add(self, row: R) -> None:
        """Keep, print and save a row."""
        self.rows.append(row)
        self.say(row.line)
        if self.path is not None:
            rows: Sequence[dict[str, object]] = [asdict(each) for each in self.rows]
            save_json(self.path, {"machine": self.machine, **self.facts, "rows": rows})

    def say(self, text: str) -> None:
        print(text, flush=True)
