"""What the load of several processes is counted from: a window in which all answers run."""

import pytest

from bench.router.load_process import rate_while_all_run, seconds_of
from mgpu.launch.bench.load import Outcome


def test_tokens_count_while_all_answers_run() -> None:
    early = Outcome(0.0, [(1.0, 1), (2.0, 5), (3.0, 5), (4.0, 5)])
    late = Outcome(0.5, [(2.0, 1), (3.0, 3), (6.0, 9)])
    assert rate_while_all_run([early, late]) == pytest.approx((5 + 5 + 3) / 2)
    assert seconds_of([early, late]) == 6.0


def test_answers_that_never_ran_together_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"2\.0 s before"):
        rate_while_all_run([Outcome(0.0, [(1.0, 1), (2.0, 1)]), Outcome(0.0, [(4.0, 1), (5.0, 1)])])
