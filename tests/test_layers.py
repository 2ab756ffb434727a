"""The arrows between folders and between their wings, the instant start, and what is never shipped."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
FOLDERS = ("protocol", "worker", "orchestrator", "launch")
MAY_IMPORT = {
    "protocol": {"protocol"},
    "worker": {"worker", "protocol"},
    "orchestrator": {"orchestrator", "protocol"},
    "launch": {"launch", "orchestrator", "protocol"},
}
FORBIDDEN = {
    "protocol": {"torch", "numpy", "tokenizers", "click", "jinja2", "psutil"},
    "worker": {"click", "tokenizers", "jinja2"},
    "orchestrator": {"torch", "click"},
    "launch": {"torch"},
}
PICKLE = re.compile(
    r"\b(pickle|cloudpickle|dill|marshal)\b|recv_pyobj|send_pyobj|_object_list\(|all_gather_object|torch\.load\(|\beval\("
)
MAX_LINES = 400


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def wing_of(path: Path) -> str:
    """Return the folder of a file in a wing; a file at the root of a top folder is a wing of its own."""
    relative = path.relative_to(ROOT)
    return str(relative if len(relative.parts) == 2 else relative.parent)


def files_by_module() -> dict[str, Path]:
    found = {}
    for folder in FOLDERS:
        for path in sources(folder):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_between_files() -> dict[Path, set[Path]]:
    files = files_by_module()
    return {
        path: {files[name[5:]] for name in imported_modules(path) if name[5:] in files and name.startswith("mgpu.")}
        - {path}
        for path in files.values()
        if path.name != "__init__.py"
    }


def imports_between_wings() -> dict[str, set[str]]:
    arrows = defaultdict(set)
    for path, others in imports_between_files().items():
        arrows[wing_of(path)] |= {wing_of(other) for other in others} - {wing_of(path)}
    return dict(arrows)


def circles(arrows: Mapping[T, set[T]]) -> list[list[T]]:
    """Return the groups of nodes that reach each other: none where the arrows form no circle."""
    ahead: dict[T, set[T]] = {}
    for node in arrows:
        todo, seen = [node], set[T]()
        while todo:
            new = arrows.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        ahead[node] = seen
    groups = {frozenset(other for other in ahead[node] if node in ahead.get(other, ())) for node in arrows}
    return [sorted(group, key=str) for group in groups if group]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    for path in sources(folder):
        for module in imported_modules(path):
            top, _, rest = module.partition(".")
            assert top not in FOLDERS, f"{path}: import mgpu.{module} instead"
            assert top not in FORBIDDEN[folder], f"{path} imports {module}"
            if top == "mgpu" and (part := rest.partition(".")[0]) in FOLDERS:
                assert part in MAY_IMPORT[folder], f"{path} imports {module}"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(imports_between_files()) == []


def test_no_wings_import_each_other_in_a_circle() -> None:
    assert circles(imports_between_wings()) == []


def wing_levels() -> dict[str, dict[str, int]]:
    """Return for each folder of the architecture page's lines the place of each wing in its line."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = next(each for each in re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "→" in each)
    levels: dict[str, dict[str, int]] = {}
    for line in re.sub(r"\n +", " ", block).splitlines():
        folder, _, order = line.partition(" ")
        names = [level.replace(".py", "").split(",") for level in order.split("→")]
        levels[folder] = {name.strip(): place for place, level in enumerate(names) for name in level}
    return levels


@pytest.mark.parametrize("folder", wing_levels())
def test_a_wing_imports_only_wings_before_it_on_the_architecture_page(folder: str) -> None:
    levels, prefix = wing_levels()[folder], "mgpu." + folder.replace("/", ".")
    for wing, place in levels.items():
        path = ROOT / folder / wing
        for source in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            text = source.read_text(encoding="utf-8")
            imported = set(re.findall(rf"^\s*from {re.escape(prefix)}\.(\w+)", text, re.MULTILINE)) - {wing}
            late = {name for name in imported if levels.get(name, -1) >= place}
            assert not late, f"{source.relative_to(ROOT)} imports {late}"


def test_the_architecture_page_has_every_wing() -> None:
    for folder, levels in wing_levels().items():
        wings = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
        assert wings - {"gateway", "http"} == {name for name in levels if (ROOT / folder / name).is_dir()}


def test_only_collectives_name_torch_distributed() -> None:
    for path in sources("worker"):
        names = [module for module in imported_modules(path) if module.startswith("torch.distributed")]
        assert not names or path.name == "collectives.py", f"{path} imports {names}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_pickled_or_evaluated(folder: str) -> None:
    for path in sources(folder):
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if PICKLE.search(line)]
        assert not found, f"{path}: {found}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_stay_short(folder: str) -> None:
    long = {path.name: count for path in sources(folder) if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_the_command_line_and_the_orchestrator_leave_torch_unimported() -> None:
    modules = [
        "mgpu." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("launch", "orchestrator", "protocol")
        for path in sources(folder)
        if path.name not in ("__init__.py", "__main__.py")
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_client_imports_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys; from mgpu import Client, AsyncClient\n"
        "sys.exit(', '.join({'torch', 'tokenizers', 'jinja2', 'numpy', 'click'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
