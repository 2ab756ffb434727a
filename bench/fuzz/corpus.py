"""Inputs that are kept: one text file a target, one input a line, in Base64; ``#`` begins a remark.

They are chosen by what they cover, and those that once broke something stay with a remark.
"""

import base64
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"


def load(name: str, folder: Path = FOLDER) -> list[bytes]:
    """Return the kept inputs of a target."""
    file = folder / f"{name}.txt"
    lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    return [base64.b64decode(line) for line in lines if not line.startswith("#")]


def write_files(inputs: Iterable[bytes], folder: Path) -> None:
    """Write each input into a file, as libFuzzer reads a corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(inputs):
        (folder / f"seed-{number:04}").write_bytes(data)


def keep(name: str, inputs: Iterable[bytes], most_bytes: int, folder: Path = FOLDER) -> int:
    """Add inputs to a target's file until they have ``most_bytes``; the shortest first. Return how many were added."""
    known, file = set(load(name, folder)), folder / f"{name}.txt"
    room, added = most_bytes - sum(map(len, known)), 0
    with file.open("a", encoding="ascii") as out:
        for data in sorted(set(inputs) - known, key=len):
            if (room := room - len(data)) < 0:
                break
            out.write(base64.b64encode(data).decode() + "\n")
            added += 1
    return added
