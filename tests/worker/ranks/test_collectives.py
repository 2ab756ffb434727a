"""Ranks as real processes add up, gather, send and receive, and notice when one of them is gone."""

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from harness.models.parts import with_changes
from harness.ranks.collective_rank import spec_of
from harness.ranks.forked import ForkedProcess
from harness.ranks.rank_processes import outputs, rank_processes
from mgpu.protocol.internal.process.child import BadSpec
from mgpu.protocol.internal.worker_messages import CONTROL
from mgpu.protocol.model.placement import Transport
from mgpu.worker.ranks import collectives, links
from mgpu.worker.ranks.collectives import UNREAD_SENDS, DistChannel, DistGroup, MeasurableGroup, SingleRank, ThroughHost
from mgpu.worker.ranks.links import _Connector, connect, layout_of, pair_transport

DEADLINE_S = 90.0


def ranks(
    case: str, sizes: list[int], transport: Transport, folder: Path, timeout_s: float = 60.0
) -> "AbstractContextManager[list[ForkedProcess]]":
    """Start one process per rank."""
    shared_bytes = spec_of(sizes, transport, 0, folder, timeout_s).shared_bytes
    plan = ",".join(map(str, sizes))
    arguments = (case, plan, transport, str(folder), str(timeout_s))
    return rank_processes("harness.ranks.collective_rank", sum(sizes), shared_bytes, *arguments)


@pytest.mark.parametrize(
    ("transport", "sizes"), [("shared-memory", [3]), ("shared-memory", [2, 1, 2]), ("gloo", [2, 1])], ids=str
)
def test_ranks_exchange_the_same_bits(transport: Transport, sizes: list[int], tmp_path: Path) -> None:
    with ranks("exchange", sizes, transport, tmp_path) as processes:
        found = outputs(processes)
    assert all(each.startswith("ok ") for each in found), found
    first = 0
    for size in sizes:
        assert len(set(found[first : first + size])) == 1, "ranks of one stage differ"
        first += size


@pytest.mark.parametrize(
    ("transport", "sizes"), [("shared-memory", [2]), ("shared-memory", [1, 1]), ("gloo", [2])], ids=str
)
def test_a_silent_peer_is_an_error_at_the_deadline(transport: str, sizes: list[int], tmp_path: Path) -> None:
    with ranks("absent", sizes, transport, tmp_path, timeout_s=1.0) as processes:
        waiting, gone = outputs(processes)
    assert gone.startswith("ok")
    assert waiting.startswith("PeerLost")


def test_a_peer_that_reports_its_failure_is_not_waited_for(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with ranks("failing", [2], "shared-memory", tmp_path, timeout_s=DEADLINE_S) as processes:
        waiting, _ = outputs(processes)
    assert waiting == "PeerLost rank 1 failed while rank 0 waited for rank 1 in a collective"
    assert time.monotonic() - began_s < DEADLINE_S / 2


def test_a_single_rank_needs_no_one(tmp_path: Path) -> None:
    links = connect(spec_of([1], "none", -1, tmp_path, 1.0), 0, torch.device("cpu"))
    x = torch.ones(2, 3)
    assert links.group.all_reduce(x) is x
    assert links.group.all_gather(x) is x


def test_ranks_without_shared_memory_or_group_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="cannot use transport 'none'"):
        connect(spec_of([2], "none", -1, tmp_path, 1.0), 0, torch.device("cpu"))
    with pytest.raises(BadSpec, match="needs the memfd"):
        connect(spec_of([1, 1], "pinned", -1, tmp_path, 1.0), 0, torch.device("cpu"))


def test_a_stage_of_one_rank_beside_larger_ones_sums_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.worker.ranks.links.start_process_group", lambda *_, **__: None)
    monkeypatch.setattr("mgpu.worker.ranks.links.new_groups", lambda ranks, _: [None] * len(ranks))
    links = connect(spec_of([2, 1], "gloo", -1, tmp_path, 1.0), 2, torch.device("cuda"))
    assert isinstance(links.group.inner, SingleRank)


def test_only_pairs_without_peer_access_use_the_host(tmp_path: Path) -> None:
    spec = with_changes(spec_of([1, 1, 1], "peer", -1, tmp_path, 1.0), staged=((1, 2),))
    spec = CONTROL.decode(CONTROL.encode(spec))
    assert pair_transport(spec, "peer", 0, 1) == "peer"
    assert pair_transport(spec, "peer", 1, 2) == "pinned"
    assert pair_transport(spec, "nccl", 1, 2) == "nccl"


def test_a_rank_that_works_alone_gets_the_shapes_of_the_group() -> None:
    group = MeasurableGroup(SingleRank())
    group.size, group.alone = 3, True
    assert group.all_reduce(torch.ones(2, 4)).shape == (2, 4)
    assert group.all_gather(torch.ones(2, 4)).shape == (2, 12)


def test_staging_through_the_host_gives_the_group_s_result() -> None:
    group = ThroughHost(SingleRank())
    x = torch.ones(2, 3)
    assert torch.equal(group.all_reduce(x), torch.ones(2, 3))
    assert torch.equal(group.all_gather(x), x)


def test_regions_of_the_shared_file_do_not_overlap(tmp_path: Path) -> None:
    layout = layout_of(spec_of([2, 1, 3], "shared-memory", 0, tmp_path, 1.0))
    taken = [(layout.failed, 64), (layout.barrier, 6 * 64)]
    for region in layout.reduce:
        taken += [(region.counters, 64 * region.size), (region.slots, 2 * region.size * region.slot_bytes)]
    for channel in [*layout.feedback, *(box for boxes in layout.activations for box in boxes)]:
        taken += [(channel.sent, 64), (channel.received, 64), (channel.handle, 1024)]
        taken.append((channel.slots, channel.depth * channel.slot_bytes))
    taken.sort()
    for (start, nbytes), (after, _) in pairwise(taken):
        assert start + nbytes <= after
    assert taken[-1][0] + taken[-1][1] <= layout.total_bytes
    assert len(layout.activations[0]) == 1
    assert len(layout.activations[1]) == 3
    assert len(layout.feedback) == 2


def test_a_sender_waits_only_for_the_message_of_some_sends_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    class Work:
        def __init__(self, number: int) -> None:
            self.number = number

        def wait(self) -> None:
            waited.append(self.number)

    numbers = iter(range(100))
    monkeypatch.setattr(collectives.dist, "isend", lambda *_, **__: Work(next(numbers)))
    channel = DistChannel(1, 0, torch.device("cpu"), torch.device("cpu"))
    for _ in range(UNREAD_SENDS):
        channel.send(torch.ones(2))
    assert waited == []
    channel.send(torch.ones(2))
    channel.send(torch.ones(2))
    assert waited == [0, 1]
    assert UNREAD_SENDS == 4, "an idle first stage leaves the feedback of so many steps unread"


@pytest.mark.parametrize("captures", [True, False])
def test_sums_of_the_library_are_tried_in_a_graph_unless_workers_have_hung(
    captures: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_changes(spec_of([2], "gloo", 0, tmp_path, 60.0), captures_library=captures)
    group = DistGroup(None, 0, 2)  # type: ignore[arg-type]
    tried: list[float] = []
    monkeypatch.setattr(_Connector, "_warm_up", lambda self, group: None)
    monkeypatch.setattr(links, "capture_problem", lambda group, device, timeout_s: tried.append(timeout_s) or "")
    connector = _Connector(replace(spec, shared_fd=-1), 0, torch.device("cpu"))
    connector._prepare_library(group)
    assert (group.is_capturable, tried) == ((True, [60.0]) if captures else (False, []))
    assert connector.notes == ([] if captures else ["sums of NCCL are not captured: workers have hung before"])
