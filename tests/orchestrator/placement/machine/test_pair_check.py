"""Peer access that the driver announces and that does not work: by processes that answer as a trial would."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from harness.machines import QWEN3_32B, cpus, gpus
from mgpu.orchestrator.placement.machine.devices import worker_environment
from mgpu.orchestrator.placement.machine.pair_check import (
    HANGS,
    NotTried,
    announced_pairs,
    checked,
    read_record,
    try_pairs,
    write_record,
)
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.planner import plan
from mgpu.orchestrator.placement.reports.table import layout_text

FOUR = gpus(80, 80, 80, 80)
PAIR_S = 2.0


def trial(*lines: str) -> list[str]:
    """Return a command whose process runs for each pair these lines of Python; ``a`` and ``b`` are its ordinals."""
    code = ["import json, os, sys, time", "def say(problem): print(json.dumps({'problem': problem}), flush=True)"]
    loop = ["for pair in sys.argv[1:]:", "  a, b = map(int, pair.split('-'))", *(f"  {line}" for line in lines)]
    return [sys.executable, "-c", "\n".join([*code, *loop])]


RIGHT = trial("say('')")
DAMAGES_1_2 = trial("say('writing damages messages' if (a, b) == (1, 2) else '')")


def test_pairs_that_work_stay_peers_and_are_tried_once(tmp_path: Path) -> None:
    record = tmp_path / "record"
    assert checked(FOUR, range(4), record, {}, RIGHT) == FOUR
    assert len(read_record(record, FOUR)) == 6
    assert checked(FOUR, range(4), record, {}, ["/nonexistent"]) == FOUR


def test_a_pair_that_damages_data_counts_as_none_and_is_named_everywhere(tmp_path: Path) -> None:
    found = checked(FOUR, range(4), tmp_path / "record", {}, DAMAGES_1_2)
    assert [(a, b) for a in range(4) for b in range(4) if a != b and not found.peers(a, b)] == [(1, 2), (2, 1)]
    assert_has_all(found.notes[0], "between GPUs 1 and 2", "writing damages messages", "host memory")
    assert worker_environment(found, 0)[0]["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_DISABLE" not in worker_environment(FOUR, 0)[0]
    planned = plan(QWEN3_32B, found, LayoutOptions())
    assert planned.layout.broken == ((1, 2), (2, 1))
    assert_has_all(layout_text(planned), "1    NVL  -    bad  NVL", "note: peer access between GPUs 1 and 2")
    without_nccl = plan(QWEN3_32B, replace(found, nccl_problem="MGPU_NO_NCCL=1"), LayoutOptions())
    assert without_nccl.layout.staged == ((1, 2),)


def test_verdicts_outlive_the_start_that_found_them_but_not_the_boot(tmp_path: Path) -> None:
    record = tmp_path / "record"
    checked(FOUR, range(4), record, {}, DAMAGES_1_2)
    assert not checked(FOUR, range(4), record, {}, ["/nonexistent"]).peers(1, 2)
    record.write_text(record.read_text().replace('"since": "', '"since": "another boot '))
    assert checked(FOUR, range(4), record, {}, RIGHT).peers(1, 2)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"since": 1}', '{"since": null, "pairs": [["GPU-0000"]]}'])
def test_a_record_that_cannot_be_read_is_like_none(tmp_path: Path, text: str) -> None:
    record = tmp_path / "record"
    record.write_text(text)
    assert read_record(record, FOUR) == {}
    assert not checked(FOUR, range(4), record, {}, DAMAGES_1_2).peers(1, 2)


def test_a_record_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    write_record(tmp_path / "missing" / "record", FOUR, {(0, 1): ""})
    assert not checked(FOUR, range(4), tmp_path / "missing" / "record", {}, DAMAGES_1_2).peers(1, 2)


def test_a_pair_that_hangs_is_found_and_those_after_it_are_tried() -> None:
    hangs = trial("time.sleep(600) if (a, b) == (0, 2) else say('')")
    verdicts = try_pairs(FOUR, [(0, 1), (0, 2), (0, 3)], {}, hangs, PAIR_S)
    assert verdicts == {(0, 1): "", (0, 2): HANGS, (0, 3): ""}


def test_what_was_found_counts_also_if_the_driver_answers_no_more() -> None:
    fails = trial(
        "if b == 3: print(json.dumps({'error': 'cuInit failed'})); break",
        "if b == 2: os._exit(9)",
        "say('')",
    )
    verdicts = try_pairs(FOUR, [(0, 1), (0, 2), (0, 3), (1, 3)], {}, fails)
    found = {(0, 1): "", (0, 2): "its trial ended with status 9"}
    assert verdicts == found | dict.fromkeys([(0, 3), (1, 3)], "not tried any more: cuInit failed")


def test_a_machine_whose_pairs_all_hang_does_not_wait_for_each_of_them() -> None:
    verdicts = try_pairs(FOUR, announced_pairs(FOUR, range(4)), {}, trial("time.sleep(600)"), 0.2)
    assert list(verdicts.values())[:2] == [HANGS, HANGS]
    assert set(list(verdicts.values())[2:]) == {"not tried, because others hang"}


def test_a_trial_that_dies_of_a_pair_counts_against_it() -> None:
    dies = trial("os.kill(os.getpid(), 11) if (a, b) == (0, 2) else say('')")
    verdicts = try_pairs(FOUR, [(0, 1), (0, 2), (0, 3)], {}, dies, PAIR_S)
    assert verdicts == {(0, 1): "", (0, 2): "its trial ended with status -11", (0, 3): ""}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (trial("print(json.dumps({'error': 'cuInit: CUDA_ERROR_UNKNOWN (999)'}))", "break"), "CUDA_ERROR_UNKNOWN"),
        (trial("sys.exit(1)"), "the trial ended with status 1"),
        (trial("print('what')", "sys.stdout.flush()"), "the trial said b'what'"),
        (["/nonexistent"], "nonexistent"),
    ],
)
def test_a_trial_that_cannot_run_leaves_what_the_driver_says_with_a_note(command: list[str], reason: str) -> None:
    found = checked(FOUR, range(4), None, {}, command)
    assert found.links == FOUR.links
    assert_has_all(found.notes[-1], "peer access was not tried", reason)
    with pytest.raises(NotTried):
        try_pairs(FOUR, [(0, 1)], {}, command)


def test_only_pairs_of_gpus_that_are_used_and_announced_are_tried() -> None:
    assert announced_pairs(FOUR, [2, 0]) == [(0, 2)]
    assert announced_pairs(FOUR, [1]) == announced_pairs(cpus(3), range(3)) == []
    assert announced_pairs(gpus(80, 80, link="none"), range(2)) == []
    assert checked(FOUR, range(4), None, {"MGPU_PAIR_CHECK": "0"}, ["/nonexistent"]) == FOUR
