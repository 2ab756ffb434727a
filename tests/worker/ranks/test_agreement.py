"""What ranks tell each other of memory that they share, and in which order they leave it."""

import pytest
import torch

from harness.ranks.rank_threads import ThreadGroup, run_ranks
from mgpu.worker.errors import PeerLost
from mgpu.worker.ranks.agreement import RankStatus, exchange, leave_in_order, this_machine
from mgpu.worker.ranks.collectives import SingleRank

CPU = torch.device("cpu")


def test_every_rank_hears_what_all_say() -> None:
    def say(group: ThreadGroup) -> list[RankStatus]:
        return exchange(group, CPU, "too late" if group.rank else "", b"handle", (group.rank + 1,))

    expected = [RankStatus(problem, this_machine(), "", 0, b"handle", (rank + 1,)) for rank, problem in
                enumerate(["", "too late"])]  # fmt: skip
    assert run_ranks(2, say) == [expected, expected]


def test_a_handle_that_no_message_holds_is_a_problem() -> None:
    [[status]] = run_ranks(1, lambda group: exchange(group, CPU, "", bytes(2000)))
    assert (status.problem, status.handle) == ("a handle of 2000 bytes", b"")


def test_a_problem_of_many_lines_is_cut_to_what_a_message_holds() -> None:
    [[status]] = run_ranks(1, lambda group: exchange(group, CPU, "x" * 5000))
    assert status.problem == "x" * 300


@pytest.mark.parametrize("are_gone", [False, True], ids=["others answer", "others are gone"])
def test_a_rank_unmaps_between_two_waits_for_the_others(are_gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Group(SingleRank):
        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            done.append("wait")
            if are_gone:
                raise PeerLost("rank 1 failed")
            return x

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("GPU idle"))
    leave_in_order(Group(), CPU, lambda: done.append("unmap"))
    assert done == ["GPU idle", "wait", "unmap", "wait"]
