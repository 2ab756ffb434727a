"""Limits of processes and threads, and what is left of them."""

import os
import resource
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.processes import task_limits
from mgpu.orchestrator.processes.child_process import describe_exit
from mgpu.orchestrator.processes.task_limits import (
    TaskLimit,
    check_task_limit,
    least_task_limit,
    task_limit_hint,
    tasks_of_server,
)


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_limits, "tasks_limits", lambda root: [])
    monkeypatch.setattr(task_limits, "_tasks_of_user", lambda: 30)


def limit_user(monkeypatch: pytest.MonkeyPatch, soft: int, exempt: bool = False) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, soft))
    monkeypatch.setattr(task_limits, "_is_exempt", lambda: exempt)


def test_the_limit_of_which_least_is_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_user(monkeypatch, 50)
    least = least_task_limit()
    assert least is not None
    assert (least.name, least.most, least.used, least.left) == ("ulimit -u", 50, 30, 20)
    monkeypatch.setattr(task_limits, "tasks_limits", lambda root: [(100, 5), (64, 60)])
    least = least_task_limit()
    assert least is not None
    assert ("pids.max" in least.name, least.left) == (True, 4)


@pytest.mark.parametrize(("soft", "exempt"), [(resource.RLIM_INFINITY, False), (4, True)])
def test_no_limit_is_none(monkeypatch: pytest.MonkeyPatch, soft: int, exempt: bool) -> None:
    limit_user(monkeypatch, soft, exempt)
    assert least_task_limit() is None


def test_nothing_is_left_of_a_limit_that_is_exceeded() -> None:
    assert TaskLimit("x", 4, 9, "").left == 0


def test_more_workers_threads_and_http_need_more() -> None:
    least = tasks_of_server(1, 2, http=False)
    assert 14 <= least <= 16  # a server of one worker on two cores was counted: 14
    assert tasks_of_server(1, 2, http=True) > least
    assert tasks_of_server(4, 1, http=False) > tasks_of_server(2, 1, http=False) > tasks_of_server(1, 1, http=False)


@pytest.mark.parametrize("allowed", range(30, 46))
def test_too_few_are_refused_with_the_numbers_and_the_way_out(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    limit_user(monkeypatch, allowed)
    if allowed - 30 >= 15:
        check_task_limit(15)
        return
    with pytest.raises(UserError) as caught:
        check_task_limit(15)
    assert_has_all(str(caught.value), "at least 15", f"ulimit -u allows {allowed}", "30 run", "ulimit -u 4096")


@pytest.mark.parametrize(("uid", "is_bounded"), [(1000, True), (0, False)])
def test_without_proc_all_users_but_root_are_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid: int, is_bounded: bool
) -> None:
    monkeypatch.setattr(task_limits, "Path", lambda _: tmp_path / "none")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (50, 50))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert (least_task_limit(tmp_path) is not None) is is_bounded


@pytest.mark.parametrize(("status", "is_told"), [(-6, True), (1, True), (-9, False), (0, False)])
def test_a_death_near_the_limit_names_it(monkeypatch: pytest.MonkeyPatch, status: int, is_told: bool) -> None:
    limit_user(monkeypatch, 40)
    assert ("ulimit -u allows 40, and 30 run" in describe_exit(status)) == is_told


def test_a_death_far_from_any_limit_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_user(monkeypatch, 4096)
    assert task_limit_hint() == ""
    assert describe_exit(-6) == "was killed by signal 6 (SIGABRT)"
