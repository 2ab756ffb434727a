"""Which changes `make mutation` draws, and which tests it runs for them."""

import random
from pathlib import Path

import pytest

from bench.mutation.__main__ import score
from bench.mutation.places import Change, annotated, changes_of, sample, sources
from bench.mutation.trial import Suite, Trial, copy_of, stages_for, try_change

ROOT = Path(__file__).parents[2]
SOURCE = """
from dataclasses import dataclass

LIMIT: int | None = 3


def within(value: int | None, low: int = 1) -> bool | None:
    if value is None:
        return None
    return low <= value < 3
"""


def change(file: str, line: int = 1) -> Change:
    return Change(file, line, "core/NumberReplacer", 0)


def test_a_sample_covers_all_wings_and_is_the_same_again() -> None:
    sizes = {f"{wing}/{name}.py": 30 for wing in ("protocol/front", "orchestrator/engine", "launch") for name in "ab"}

    def drawn(count: int, seed: int) -> list[Change]:
        return sample(sizes, lambda file: [[change(file, line)] for line in range(30)], count, random.Random(seed))

    ten = drawn(10, seed=3)
    assert ten == drawn(10, seed=3) != drawn(10, seed=4)
    assert {str(Path(each.file).parent) for each in ten} == {"protocol/front", "orchestrator/engine", "launch"}
    assert len(set(ten)) == 10
    assert len(drawn(10_000, seed=3)) == 180
    assert len(drawn(2, seed=3)) == 2


def test_annotations_are_left_alone() -> None:
    inside = annotated(SOURCE)
    lines = SOURCE.splitlines()
    named = {lines[line - 1][column] for line, column in inside}
    assert "|" in named
    assert (4, lines[3].index("3")) not in inside
    assert (7, lines[6].index("1")) not in inside


def test_all_wings_have_tests_and_the_nearest_run_first() -> None:
    for file in sources(ROOT):
        stages = stages_for(ROOT, str(file))
        assert stages, file
        assert all((ROOT / test).exists() for stage in stages for test in stage)
    assert stages_for(ROOT, "orchestrator/scheduler/fair_queue.py")[0] == (
        "tests/orchestrator/scheduler/test_fair_queue.py",
    )
    assert not [file for file in sources(ROOT) if file.parts[:2] == ("worker", "kernels")]


def test_the_score_counts_what_was_changed() -> None:
    trials = [
        Trial(change("a"), outcome, "", "", 1.0) for outcome in ("caught", "caught", "survived", "unsure", "no change")
    ]  # type: ignore[arg-type]
    assert score(trials) == "2 of 3 caught: 66.7%"
    assert score([]) == "0 of 0 caught: 0.0%"


def test_a_copy_has_the_links_of_the_package(tmp_path: Path) -> None:
    copy_of(ROOT, tmp_path)
    assert (tmp_path / "src" / "mgpu" / "protocol").is_symlink()
    assert (tmp_path / "src" / "mgpu" / "protocol" / "errors.py").is_file()


@pytest.mark.parametrize(
    ("test", "outcome"),
    [("within(3) is False", "caught"), ("within(None) is None", "survived"), ("within(2) is False", "survived")],
)
def test_a_change_is_caught_or_survives_and_the_file_is_restored(tmp_path: Path, test: str, outcome: str) -> None:
    pytest.importorskip("cosmic_ray", reason="the extra mutation is not installed")
    (tmp_path / "launch").mkdir()
    (tmp_path / "tests" / "launch").mkdir(parents=True)
    (tmp_path / "launch" / "limits.py").write_text(SOURCE)
    (tmp_path / "tests" / "launch" / "test_limits.py").write_text(
        f"import sys; sys.path.insert(0, {str(tmp_path / 'launch')!r})\n"
        f"from limits import within\n\n\ndef test_it():\n    assert {test}\n"
    )
    found = changes_of(tmp_path, "launch/limits.py", ["core/NumberReplacer"])
    [upper] = [places[0] for places in found if places[0].line == 10]
    tests = Suite(tmp_path, timeout_s=60.0)
    trial = try_change(tests, upper)
    assert (trial.outcome, bool(trial.by)) == (outcome, outcome != "survived")
    fails_anyway = test == "within(2) is False"
    assert tests.failing == ({"tests/launch/prepare/test_limits.py::test_it"} if fails_anyway else set())
    assert "+    return low <= value < " in trial.diff
    assert (tmp_path / "launch" / "limits.py").read_text() == SOURCE
