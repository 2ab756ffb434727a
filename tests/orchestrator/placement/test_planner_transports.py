"""How ranks and stages of a plan talk."""

import pytest

from harness.machines import TINY, cpus, gpus
from harness.planning import planned
from mgpu.orchestrator.placement.machine.devices import Machine, oversubscribed


@pytest.mark.parametrize(("machine", "layers", "expected"), [
    (gpus(80), None, ("none", "none")),
    (gpus(80, 80), None, ("nccl", "none")),
    (gpus(80, 80), "0:4;1:4", ("none", "nccl")),
    (gpus(*[80] * 4), "0+1:4;2+3:4", ("nccl", "nccl")),
    (gpus(80, 80, nccl=False), None, ("none", "peer")),
    (gpus(80, 80, nccl=False, link="pcie"), None, ("none", "peer")),
    (gpus(80, 80, nccl=False, link="none"), None, ("none", "pinned")),
    (gpus(*[80] * 4, nccl=False, link="none"), "0+1:4;2+3:4", ("gloo", "pinned")),
    (oversubscribed(gpus(80), 2), None, ("none", "peer")),
    (oversubscribed(gpus(80), 2), "0+1:8", ("gloo", "none")),
    (oversubscribed(gpus(80), 2), "0:4;1:4", ("none", "peer")),
    (cpus(1), None, ("none", "none")),
    (cpus(2), None, ("shared-memory", "none")),
    (cpus(2), "0:4;1:4", ("none", "shared-memory")),
    (cpus(2, shared_memory=False), None, ("gloo", "none")),
    (cpus(2, shared_memory=False), "0:4;1:4", ("none", "gloo")),
    (cpus(4), "0+1:4;2+3:4", ("shared-memory", "shared-memory")),
])  # fmt: skip
def test_transports(machine: Machine, layers: str | None, expected: tuple[str, str]) -> None:
    result = planned(TINY, machine, device_layers=layers)
    assert (result.layout.transport, result.layout.stage_transport) == expected


def test_staging_through_the_host_is_said_once_naming_the_pairs() -> None:
    result = planned(TINY, gpus(80, 80, 80, nccl=False, link="none"))
    staged = [note for note in result.notes if "pinned host memory" in note]
    assert len(staged) == 1
    assert "0 and 1, 1 and 2" in staged[0]
    direct = planned(TINY, gpus(80, 80, 80, nccl=False))
    assert not any("pinned" in note for note in direct.notes)


def without_access(count: int) -> Machine:
    """GPUs that reach each other's memory, but for 0 and 2."""
    machine = gpus(*[80] * count, nccl=False)
    rows = [list(row) for row in machine.links]
    rows[0][2] = rows[2][0] = "none"
    return Machine(machine.devices, tuple(map(tuple, rows)), "MGPU_NO_NCCL=1")


def test_pairs_that_never_talk_do_not_matter() -> None:
    assert planned(TINY, without_access(3)).layout.stage_transport == "peer"


def test_one_boundary_without_peer_access_leaves_the_others_direct() -> None:
    islands = without_access(4)
    mapped = planned(TINY, islands, device_layers="0:3;2:3;1:2")
    assert (mapped.layout.stage_transport, mapped.layout.staged) == ("peer", ((0, 1),))
    assert any("between GPUs 0 and 2:" in note for note in mapped.notes)
    hybrid = planned(TINY, islands, device_layers="1+0:4;3+2:4")
    assert (hybrid.layout.stage_transport, hybrid.layout.staged) == ("peer", ((1, 3),))
    direct = planned(TINY, islands)
    assert (direct.layout.stage_transport, direct.layout.staged) == ("peer", ())
    nowhere = planned(TINY, gpus(80, 80, nccl=False, link="none"))
    assert (nowhere.layout.stage_transport, nowhere.layout.staged) == ("pinned", ((0, 1),))
    assert (
        planned(TINY, gpus(80, 80, link="none"), device_layers="0:4;1:4").layout.staged == ()
    )  # NCCL finds its own way
