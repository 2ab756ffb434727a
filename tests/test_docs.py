"""The pages name only what exists: paths, modules, commands, options, tests, and links to one another."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from mgpu.launch.cli import cli

ROOT = Path(__file__).parent.parent
TOPS = ("protocol", "worker", "orchestrator", "launch", "bench", "tests", "docs", "src", ".ci")
REFERENCE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""Pages about the code as it is. The changelog names what has gone as well: only its links are checked."""
ALL = [*REFERENCE, ROOT / "CHANGELOG.md"]
README_LINES = 145
FOREIGN_TYPES = {"MemoryMax"}
"""Names in two humps that are not ours: settings of systemd that no unit of ours has."""
PATH = re.compile(rf"(?:{'|'.join(map(re.escape, TOPS))})/[\w./*-]*|[\w-]+\.(?:py|md|sh|toml)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TYPE = re.compile(r"[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]+)+")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """Return the code spans of the page's prose."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def command_lines(page: Path) -> list[str]:
    """Return what a reader may type: lines of code blocks without their remarks, and code spans."""
    lines = [line.partition("#")[0] for block in fences(page) for line in block.splitlines()]
    return [*lines, *spans(page)]


@cache
def file_names() -> frozenset[str]:
    return frozenset(path.name for top in TOPS for path in (ROOT / top).rglob("*") if path.is_file())


@cache
def sources() -> str:
    paths = [path for top in TOPS[:5] for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".service")]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@cache
def bench_flags() -> frozenset[str]:
    return frozenset(flag for path in (ROOT / "bench").rglob("*.py") for flag in declared_flags(path))


def declared_flags(path: Path) -> list[str]:
    return re.findall(r'"(--[a-z][a-z0-9-]*)"', path.read_text(encoding="utf-8"))


def flags_of(command: click.Command) -> set[str]:
    return {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)} | {"--help", "-h"}


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in commands(command))


@cache
def all_commands() -> dict[str, click.Command]:
    return dict(commands(cli))


@cache
def all_flags() -> frozenset[str]:
    return frozenset().union({"--version"}, bench_flags(), *map(flags_of, all_commands().values()))


def is_path(name: str) -> bool:
    """Return whether a file, a folder or a pattern of the repository, or any file of that name, is there."""
    if "/" not in name:
        return name in file_names() or (ROOT / name).exists()
    return any(ROOT.glob(name.rstrip("/")))


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", REFERENCE, ids=page_id)
def test_a_path_on_a_page_exists(page: Path) -> None:
    named = {span for span in spans(page) if PATH.fullmatch(span) and "NAME" not in span}
    assert {name for name in named if not is_path(name)} == set()


@pytest.mark.parametrize("page", REFERENCE, ids=page_id)
def test_a_module_that_a_page_runs_exists_and_has_the_options(page: Path) -> None:
    for line in command_lines(page):
        for module, arguments in re.findall(r"python -m ((?:mgpu|bench)[\w.]*)([^`|;&]*)", line):
            found = importlib.util.find_spec(module)
            assert found is not None, f"no module {module}: {line}"
            if found.submodule_search_locations is None:
                sources = [Path(str(found.origin))]
            else:
                assert importlib.util.find_spec(f"{module}.__main__"), f"{module} cannot be run: {line}"
                folder = Path(str(found.origin)).parent
                sources = [*folder.glob("*.py"), *folder.rglob("*/options.py")]
            own = arguments.partition(" -- ")[0]
            declared = {flag for source in sources for flag in declared_flags(source)} | {"--help"}
            assert module == "mgpu" or set(FLAG.findall(own)) <= declared, line


@pytest.mark.parametrize("page", REFERENCE, ids=page_id)
def test_a_command_on_a_page_exists_and_has_the_options(page: Path) -> None:
    for line in command_lines(page):
        for text in re.findall(r"mgpu-launch +([^`]+)", line):
            words = shlex.split(text.replace("…", " "))
            own, rest = (words[: words.index("--")], words[words.index("--") :]) if "--" in words else (words, [])
            names = own[1].split("|") if own[0] == "bench" and len(own) > 1 else [""]
            for name in names:
                command = all_commands().get(f"{own[0]} {name}".strip()) or all_commands().get(own[0])
                assert command is not None or own[0].startswith("-"), f"no command {own[0]}: {line}"
                if command is not None:
                    flags = {word.partition("=")[0] for word in own if re.match(r"--?[a-z]", word)}
                    assert flags <= flags_of(command), line
            assert {word for word in rest if re.match("--[a-z]", word)} <= flags_of(all_commands()["serve"]), line


@pytest.mark.parametrize("page", REFERENCE, ids=page_id)
def test_an_option_on_a_page_exists(page: Path) -> None:
    foreign = re.compile(r"python -m|pip|systemctl|systemd|pytest|git |nvidia|loginctl")
    named = {flag for span in spans(page) if not foreign.search(span) for flag in FLAG.findall(span)}
    assert named - all_flags() == set()


@pytest.mark.parametrize("page", REFERENCE, ids=page_id)
def test_a_make_target_on_a_page_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for line in command_lines(page) for name in re.findall(r"(?:^|[;&]) *make ([a-z][a-z-]*)", line)}
    assert named <= targets


@pytest.mark.parametrize("page", REFERENCE, ids=page_id)
def test_a_test_that_a_page_names_exists(page: Path) -> None:
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    assert {span for span in spans(page) if re.fullmatch(r"test_\w+", span)} <= defined


@pytest.mark.parametrize("page", REFERENCE, ids=page_id)
def test_a_type_that_a_page_names_is_in_the_sources(page: Path) -> None:
    named = {name for span in spans(page) for name in re.findall(rf"\b{TYPE.pattern}\b", span)}
    assert {name for name in named - FOREIGN_TYPES if not re.search(rf"\b{name}\b", sources())} == set()


@pytest.mark.parametrize("page", ALL, ids=page_id)
def test_a_link_on_a_page_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}: no such heading"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < README_LINES
