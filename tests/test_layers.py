"""The arrows between the folders, the instant start, and what is never shipped."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
