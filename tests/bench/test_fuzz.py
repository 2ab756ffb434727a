"""The corpus of `make fuzz` is replayed, and what counts as a finding is found."""

import importlib.util
import time
from pathlib import Path

import pytest

from bench.fuzz import corpus
from bench.fuzz.__main__ import Row, fuzz
from bench.fuzz.choices import MOST_CHARS, Choices
from bench.fuzz.target import Target, examine
from bench.fuzz.targets import TARGETS

has_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs atheris (`make fuzz` installs it)"
)


@pytest.mark.parametrize("name", TARGETS)
def test_every_kept_input_is_handled(name: str) -> None:
    target = TARGETS[name]
    inputs = [*target.seeds(), *corpus.load(name)]
    assert inputs
    for data in inputs:
        finding = examine(target, data)
        assert finding is None, f"{data!r}: {finding}"


def test_the_corpus_has_no_file_without_a_target_and_is_small() -> None:
    files = list(corpus.FOLDER.iterdir())
    assert {file.stem for file in files} <= set(TARGETS)
    assert sum(file.stat().st_size for file in files) < 100_000


def test_an_unexpected_exception_is_a_finding_named_by_its_place() -> None:
    def run(data: bytes) -> None:
        if data == b"refused":
            raise ValueError
        raise KeyError(data)

    target = Target(run, (ValueError,))
    assert examine(target, b"refused") is None
    finding = examine(target, b"x")
    assert finding is not None
    assert finding.kind.startswith("KeyError at test_fuzz.py:")


def test_a_panic_is_a_finding_and_a_signal_passes() -> None:
    class Panic(BaseException):
        pass

    def run(data: bytes) -> None:
        raise Panic if data else KeyboardInterrupt

    finding = examine(Target(run, ()), b"x")
    assert finding is not None
    assert "Panic" in finding.kind
    with pytest.raises(KeyboardInterrupt):
        examine(Target(run, ()), b"")


def test_too_much_time_or_memory_is_a_finding() -> None:
    def spin(_: bytes) -> None:
        end_s = time.process_time() + 0.02
        while time.process_time() < end_s:
            pass

    slow = examine(Target(spin, (), most_s=0.01), b"")
    assert slow is not None
    assert slow.kind == "slow"
    large = examine(Target(lambda _: b"x" * (1 << 28), (), most_bytes=1 << 20, most_s=60), b"")
    assert large is not None
    assert large.kind == "memory"


def test_choices_are_the_same_for_the_same_bytes_and_end_with_them() -> None:
    data = bytes(range(256)) * 4
    words = ("a", "b")
    assert repr(Choices(data).fields(words)) == repr(Choices(data).fields(words))
    empty = Choices(b"")
    assert (empty.number(), empty.pick(words), empty.text(), empty.value(), empty.is_empty) == (0, "a", "", None, True)
    assert len(Choices(b"\x01\x28" + b"x" * 40 + b"\x05\x05" * 50).text()) == MOST_CHARS


def test_kept_inputs_are_read_again_the_shortest_within_the_bound(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("# once broke it\nAAAA\n")
    assert corpus.load("x", tmp_path) == [b"\0\0\0"]
    assert corpus.keep("x", [b"22", b"333", b"1", b"\0\0\0"], 6, tmp_path) == 2
    assert corpus.load("x", tmp_path) == [b"\0\0\0", b"1", b"22"]


def test_a_row_with_a_finding_is_not_good() -> None:
    assert Row("x", cpu_s=2.0, inputs=10).line == "| x | 0.0 | 10 | 5 | 0 | 0 | 0 | yes |"
    assert "NO" in Row("x", findings=["slow"]).line


@has_atheris
def test_fuzzing_counts_inputs_and_remembers_them(tmp_path: Path) -> None:
    row = fuzz("layer-map", tmp_path / "layer-map", 0.5)
    assert row.findings == []
    assert row.inputs > 100
    assert row.edges > 10
    assert len(list((tmp_path / "layer-map" / "inputs").iterdir())) >= row.corpus > 2
