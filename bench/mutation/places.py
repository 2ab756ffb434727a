"""The places of the code that can be changed, and a seeded sample of them over all wings.

cosmic-ray finds the places and makes the changes: comparisons, arithmetic, numbers, booleans, `and` and `or`,
conditions, loops, exceptions, decorators, return values. Of the changes that it offers for one place, one is drawn.
"""

import ast
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOPS = ("protocol", "orchestrator", "worker", "launch")
WITHOUT_GPU_UNTESTED = ("worker/kernels/", "worker/start/compile_ahead/")
"""Kernels: a mirrored test takes minutes in Triton's interpreter, and much of them runs on a GPU only."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one place."""

    file: str
    line: int
    operator: str
    """Its name in cosmic-ray."""
    occurrence: int
    """The number of the place among all that the operator finds in the file."""


def sources(root: Path) -> list[Path]:
    """Return the files whose faults tests can notice on any machine."""
    found = [path.relative_to(root) for top in TOPS for path in sorted((root / top).rglob("*.py"))]
    return [path for path in found if path.name != "__init__.py" and not str(path).startswith(WITHOUT_GPU_UNTESTED)]


def annotated(source: str) -> set[tuple[int, int]]:
    """Return line and column of everything inside annotations, where a change changes nothing or ends every import."""
    inside: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(source)):
        roots: list[ast.AST | None] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            roots.append(node.returns)
        elif isinstance(node, (ast.AnnAssign, ast.arg)):
            roots.append(node.annotation)
        for root in roots:
            if isinstance(root, ast.expr):
                last = (root.end_lineno or root.lineno, root.end_col_offset or 0)
                inside |= _span((root.lineno, root.col_offset), last, source)
    return inside


def _span(first: tuple[int, int], last: tuple[int, int], source: str) -> set[tuple[int, int]]:
    lines = source.splitlines()
    return {
        (line, column)
        for line in range(first[0], last[0] + 1)
        for column in range(first[1] if line == first[0] else 0, last[1] if line == last[0] else len(lines[line - 1]))
    }


def operators(rng: random.Random) -> list[str]:
    """Return the operators' names; of those that replace one sign by different others, one is drawn."""
    from cosmic_ray.plugins import get_operator, operator_names

    alike: dict[str, list[str]] = {}
    for name in sorted(operator_names()):
        if not get_operator(name).arguments():
            alike.setdefault(name.rpartition("_")[0] or name, []).append(name)
    return [rng.choice(names) for names in alike.values()]


def changes_of(root: Path, file: str, names: Sequence[str]) -> list[list[Change]]:
    """Return the changes of each place of a file that these operators make."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source = (root / file).read_text(encoding="utf-8")
    skipped, nodes = annotated(source), list(ast_nodes(get_ast(source)))
    by_place: dict[tuple[tuple[int, int], tuple[int, int]], list[Change]] = {}
    for name in names:
        operator = get_operator(name)()
        positions = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(positions):
            if tuple(start) not in skipped:
                by_place.setdefault((start, end), []).append(Change(file, start[0], name, occurrence))
    return list(by_place.values())


def sample(
    sizes: Mapping[str, int], places_of: Callable[[str], list[list[Change]]], count: int, rng: random.Random
) -> list[Change]:
    """Draw a place in each wing, then others from all files, by their sizes; of each place one change."""
    wings: dict[str, list[str]] = {}
    for file in sizes:
        wings.setdefault(str(Path(file).parent), []).append(file)
    files = [rng.choices(each, [sizes[file] for file in each])[0] for each in wings.values()]
    files = rng.sample(files, min(count, len(files)))
    files += rng.choices(list(sizes), list(sizes.values()), k=count - len(files))
    left: dict[str, list[list[Change]]] = {}
    drawn = []
    for file in files:
        if file not in left:
            places = places_of(file)
            left[file] = rng.sample(places, len(places))
        if left[file]:
            drawn.append(rng.choice(left[file].pop()))
    return drawn
