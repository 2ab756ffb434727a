"""A server does not begin where it would run out of open files."""

import resource

import pytest

from mgpu.launch.commands.serve import allow_open_files
from mgpu.launch.prepare.preflight import LEAST_FILES
from mgpu.orchestrator.errors import UserError

ENDLESS = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(1024, 4096, None), (LEAST_FILES, LEAST_FILES, None), (20, 4096, 4096), (20, ENDLESS, 4 * LEAST_FILES)],
)
def test_a_low_limit_is_raised_as_far_as_is_allowed(
    soft: int, hard: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    allow_open_files()
    assert asked == ([] if raised is None else [(raised, hard)])


def test_a_limit_that_cannot_be_raised_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (20, 40))
    with pytest.raises(UserError, match=r"40 open files here and a server needs 256: .* \(ulimit -n 1024"):
        allow_open_files()
