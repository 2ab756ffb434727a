"""The devices of hosts that have joined, as a machine to plan on: no memory is shared, and every rank takes part."""

import itertools
from dataclasses import replace

import pytest

from harness.ranks.hellos import hello, roster
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.hosts.machine import check_layout, machine_of, repeated
from mgpu.orchestrator.hosts.roster import Roster
from mgpu.orchestrator.placement.machine.devices import Machine, cpu_machine, uniform_links
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.planner import Plan, plan
from mgpu.protocol.internal.host_messages import RankDevice

GPU = RankDevice("cuda", "H200", 140 << 30, 139 << 30, "ab12", (9, 0))
FACTS = make_facts(q=4, kv=4, layers=4, hidden=64, width=128, head_dim=16, vocab=1000, context=256)


def whole(count: int = 2, device: RankDevice | None = None, no_nccl: str = "") -> tuple[Roster, Machine]:
    ranks, _ = roster(nodes=count)
    for rank in range(count):
        changes = {} if device is None else {"device": device}
        assert ranks.take(hello(rank, world_size=count, **changes)) == ""
    return ranks, machine_of(ranks, {"MGPU_NO_NCCL": no_nccl})


def planned(machine: Machine, **options: object) -> Plan:
    return plan(FACTS, machine, LayoutOptions(**options))  # type: ignore[arg-type]


def test_ranks_on_cpus_use_gloo_and_no_shared_memory() -> None:
    _, machine = whole()
    assert planned(machine).layout.transport == "gloo"
    assert planned(machine, device_layers="0:2;1:2").layout.stage_transport == "gloo"
    assert [device.name for device in machine.devices] == ["CPU of host-0", "CPU of host-1"]


@pytest.mark.parametrize(("no_nccl", "transport"), [("", "nccl"), ("1", "gloo")])
def test_ranks_on_gpus_use_nccl_or_gloo_and_no_peer_memory(no_nccl: str, transport: str) -> None:
    _, machine = whole(device=GPU, no_nccl=no_nccl)
    for options in ({"tp": 2}, {"device_layers": "0:2;1:2"}):
        layout = planned(machine, **options).layout
        assert {layout.transport, layout.stage_transport} == {transport, "none"}
        assert layout.staged == ()


def test_a_layout_that_leaves_a_rank_out_is_refused() -> None:
    ranks, machine = whole(3)
    check_layout(planned(machine, device_layers="0:2;1:1;2:1").layout, ranks)
    with pytest.raises(PlacementError, match="3 ranks have joined, and the layout has 2 and leaves out rank 1"):
        check_layout(planned(machine, device_layers="0:2;2:2").layout, ranks)


def test_what_to_type_for_a_model_that_does_not_split_is_said_in_words_of_the_launcher() -> None:
    _, machine = whole(3)
    with pytest.raises(PlacementError) as caught:
        planned(machine)
    assert "Use a launcher with 2 processes in all (WORLD_SIZE=2)" in str(caught.value)
    assert "--workers" not in str(caught.value)


def test_a_plan_for_hosts_that_have_not_joined_is_that_of_the_joined_ones() -> None:
    _, joined = whole(4, GPU)
    one = replace(joined, devices=joined.devices[:2], hosts=(), links=uniform_links(2, "nvlink"))
    assumed = repeated(one, 2)
    assert assumed.hosts == ("host 0", "host 0", "host 1", "host 1")
    assert not any(assumed.peers(first, second) for first, second in itertools.combinations(range(4), 2))
    assert planned(assumed).layout == planned(joined).layout
    on_cpus = repeated(cpu_machine(1), 2)
    assert on_cpus.nccl_problem
    assert not on_cpus.shared_memory
