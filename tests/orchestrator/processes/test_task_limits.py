"""Limits of processes and threads, and what is left of them."""

import resource

import pytest

from mgpu.orchestrator.processes import task_limits
from mgpu.orchestrator.processes.task_limits import TaskLimit, least_task_limit


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
