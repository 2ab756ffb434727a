"""`make attack` in its shortest form, and its judgement of what it sees."""

import argparse
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.attack import hostile, sessions, small_model
from bench.attack.__main__ import run_attacks
from bench.attack.attacks import ATTACKS, situation_of
from bench.attack.peers import Attacker
from bench.attack.row import Row
from bench.attack.sessions import Seen, run_sessions
from bench.attack.situations import ORDINARY, make_model
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.tokenizer import load_codec

GOOD = {"first_token_ratio": 1.2, "rate_ratio": 0.9}


@pytest.fixture(scope="module")
def options() -> argparse.Namespace:
    return argparse.Namespace(
        model=small_model.NAME,
        streams=2,
        seconds=1.0,
        calm=2.0,
        only=["garbage-bytes", "bad-fields"],
        strengths=[1],
        seed=1,
        settle_s=0.5,
        minutes=3.0,
        processes=1,
        width=64,
    )  # fmt: skip


@pytest.mark.timeout(240)
def test_attacks_cost_no_stream_a_token(options: argparse.Namespace) -> None:
    """How slow streams become is for a machine that does nothing else: `make attack` judges it, on both transports."""
    rows = list(run_attacks("tcp", options))  # type: ignore[arg-type]
    assert [(row.attack, row.strength) for row in rows] == [("garbage-bytes", 1), ("bad-fields", 1)]
    for row in rows:
        assert (row.lost, row.different, row.counted_restarts) == (0, 0, 0), row.problems
        assert row.cost["nbytes"] > 100, "nothing was attacked"
        assert not [problem for problem in row.problems if "ended" in problem]


@pytest.mark.timeout(240)
def test_attacks_over_http_cost_no_stream_a_token_there_or_on_the_front_channel(options: argparse.Namespace) -> None:
    options = argparse.Namespace(**vars(options) | {"only": ["http-malformed", "http-abandoned-streams"]})
    rows = list(run_attacks("ipc", options))  # type: ignore[arg-type]
    assert [row.attack for row in rows] == options.only
    for row in rows:
        assert (row.lost, row.different, row.counted_restarts) == (0, 0, 0), row.problems
        assert row.cost["nbytes"] > 100, "nothing was attacked"
        assert row.rate_ratio > 0, "of the streams over HTTP too"


@pytest.mark.timeout(240)
def test_hundreds_of_hostile_sessions_cost_no_stream_a_token(options: argparse.Namespace) -> None:
    row = hostile.run("ipc", 200, options)  # type: ignore[arg-type]
    assert (row.lost, row.different, row.never_ended, row.counted_restarts) == (0, 0, 0, 0), row.problems
    assert row.sessions == 200, row.problems
    assert row.honest_answers > 0
    assert len(row.of_character) == 10
    assert sum(row.actions.values()) > 200  # few sessions wait for an answer, and a fast run sees none


@pytest.mark.parametrize("name", sorted(name for name in ATTACKS if situation_of(name) != ORDINARY))
def test_a_situation_has_what_its_attack_needs(name: str, tmp_path: Path) -> None:
    situation = situation_of(name)
    if not situation.split:
        assert situation.open_files or situation.http
        return
    codec = load_codec(str(make_model(tmp_path / "model", situation)), "safetensors")
    assert codec is not None
    assert codec.encode("hello", add_special_tokens=False) == [72, 69, 76, 76, 79]
    with pytest.raises(TokenizerError, match="gave up"):
        codec.encode("a" * 30)


def test_every_token_of_the_small_model_has_a_text_and_common_words_are_one_token(tmp_path: Path) -> None:
    """So attacks by long texts, by texts that just fit and by stop strings do there what they do to a real model."""
    codec = load_codec(str(small_model.write_small_model(tmp_path / "model")), "safetensors")
    assert codec is not None
    assert 250 < len(codec.encode("hello " * 300)) < 350
    assert all(codec.all_bytes(token_id) for token_id in range(small_model.VOCABULARY))


def test_sessions_of_an_impatient_attacker_end_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    passing = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(passing) / 1000, sleep=lambda _: None)
    monkeypatch.setattr(sessions, "time", clock)
    attacker = Attacker("ipc:///nowhere/at/all", None, 1)
    seen = Seen()
    done = run_sessions(itertools.count(), 7, [attacker], 8, 1.0, seen, finishes=False)
    attacker.close()
    assert 0 < done < sum(seen.sessions.values())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"first_token_ratio": 3.5}, "first token"),
        ({"rate_ratio": 0.5}, "tokens per second"),
        ({"counted_restarts": 1}, "counted restarts"),
        ({"lost": 1}, "lost streams"),
        ({"different": 1}, "different streams"),
        ({"log_bytes_per_s": 2000.0}, "log"),
        ({"grown_bytes": 1 << 30}, "bytes kept"),
        ({"grown_descriptors": 9}, "descriptors kept"),
    ],
)
def test_what_an_attack_may_not_do_is_a_problem(changes: dict[str, float], problem: str) -> None:
    row = Row("x", "ipc", 1, **(GOOD | changes))  # type: ignore[arg-type]
    row.judge()
    assert [problem in each for each in row.problems] == [True]
    assert "NO" in row.line


def test_a_row_within_its_bounds_is_good() -> None:
    row = Row("x", "ipc", 1, **GOOD)  # type: ignore[arg-type]
    row.judge()
    assert row.is_good
    assert "yes" in row.line


def test_attacks_are_named_as_options_are_written() -> None:
    assert all(name == name.lower() and "_" not in name for name in ATTACKS)
