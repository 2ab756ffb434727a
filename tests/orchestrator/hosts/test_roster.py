"""Who may join, who is refused with which words, who is missing, and who is lost. Hosts' own clocks play no part."""

from dataclasses import replace
from typing import Any

import pytest

from harness.ranks.hellos import MODEL, hello, roster
from mgpu.orchestrator.hosts.roster import missing_text, wrong_nodes_text
from mgpu.protocol.internal.host_messages import RankDevice
from mgpu.protocol.model.fingerprint import ModelPrint


def test_a_roster_is_whole_when_every_rank_is_there() -> None:
    ranks, _ = roster()
    assert ranks.world_size == 0
    assert not ranks.is_whole
    assert ranks.take(hello(1)) == ""
    assert ranks.missing() == [0]
    assert ranks.take(hello(0)) == ""
    assert ranks.is_whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": "1.1"}, "rank 1 on host host-1 (process 1001): it has mgpu 1.1, and host head 1.0"),
        ({"commit": "def"}, "its mgpu is commit def, and that of host head abc"),
        (
            {"model": ModelPrint("/models/b", "config-2", "tensors-1")},
            "its model in /models/b is another one than that of host head in /srv/a: the configuration is config-2 "
            "there and config-1 here",
        ),
        ({"model": ModelPrint("/m", "config-1", "tensors-2")}, "the tensors are tensors-2 there and tensors-1 here"),
        ({"model": ModelPrint("/m", "config-1", "")}, "the tensors are missing there and tensors-1 here"),
        ({"world_size": 3}, "its WORLD_SIZE is 3, and that of this server is 2: start 2 processes in all"),
        ({"rank": 2}, "ranks are 0 to 1 with WORLD_SIZE=2"),
        ({"rank": -1}, "ranks are 0 to 1 with WORLD_SIZE=2"),
        ({"master": "10.0.0.2:29500"}, "is 10.0.0.2:29500, and that of rank 0 on host host-0 (process 1000) is 10"),
        ({"master": ""}, "its MASTER_ADDR:MASTER_PORT is not set"),
        ({"device": RankDevice("cuda", "H200", 1, 1)}, "it runs on cuda, and rank 0 on host host-0 (process 1000) on"),
    ],
)  # fmt: skip
def test_a_process_that_does_not_fit_is_refused_with_both_values(changes: dict[str, Any], says: str) -> None:
    ranks, _ = roster()
    assert ranks.take(hello(0)) == ""
    problem = ranks.take(replace(hello(1), **changes))
    assert says in problem
    assert ranks.missing() == [1]
    assert ranks.refusals == [problem]
    assert ranks.take(hello(1, incarnation=b"restarted", host="mended")) == ""


def test_an_installed_host_has_no_commit_to_compare_and_dummy_weights_no_tensors() -> None:
    ranks, _ = roster(needs_weights=False)
    assert ranks.take(hello(0, commit="", model=ModelPrint("/m", MODEL.config, ""))) == ""


def test_a_world_smaller_than_the_hosts_is_refused() -> None:
    ranks, _ = roster(nodes=3)
    assert "WORLD_SIZE=2 is too small for --nodes 3" in ranks.take(hello(0))


def test_a_host_too_many_is_refused_with_the_number_to_type() -> None:
    ranks, _ = roster(nodes=1)
    assert ranks.take(hello(0)) == ""
    assert "host number 2, and --nodes is 1 (joined: host-0): type --nodes 2" in ranks.take(hello(1))


def test_ranks_that_are_all_on_fewer_hosts_are_counted() -> None:
    ranks, _ = roster(nodes=2)
    for rank in range(2):
        assert ranks.take(hello(rank, node="0", host="one")) == ""
    assert "all 2 ranks have joined from 1 host (one), and --nodes is 2: type --nodes 1" in wrong_nodes_text(ranks)


def test_a_second_process_of_a_rank_is_refused_once_the_first_is_heard_again() -> None:
    ranks, clock = roster()
    second = hello(0, incarnation=b"second..", host="elsewhere", pid=7)
    assert ranks.take(hello(0)) == ""
    clock.now_s += 0.2
    assert ranks.take(second) == ""  # not known yet whether the first still lives
    assert ranks.members[0].hello.host == "host-0"
    clock.now_s += 0.8
    assert ranks.take(hello(0)) == ""
    assert ranks.take(second) == (
        "rank 0 on host elsewhere (process 7): this rank has joined already, as process 1000 on host host-0. End one "
        "of them; each process needs a RANK of its own"
    )
    assert ranks.members[0].hello.host == "host-0"


def test_a_rank_that_was_started_again_takes_the_place_of_the_lost_one() -> None:
    ranks, clock = roster()
    assert ranks.take(hello(0)) == ""
    again = hello(0, incarnation=b"again...")
    clock.now_s += 0.5
    assert ranks.take(again) == ""
    ranks.drop(0)  # its connection is gone
    clock.now_s += 1.0
    assert ranks.take(again) == ""
    assert ranks.members[0].hello.incarnation == b"again..."


def test_a_member_is_silent_by_the_clock_of_the_head_alone() -> None:
    ranks, clock = roster()
    for rank in range(2):
        ranks.take(hello(rank))
    clock.now_s += 9.0
    ranks.take(hello(1))
    clock.now_s += 1.5
    assert [member.hello.rank for member in ranks.silent()] == [0]


def test_the_error_of_the_deadline_says_who_is_missing_and_what_to_type() -> None:
    ranks, _ = roster()
    assert "no rank has joined tcp://h:1 within 5 s (--join-timeout). Start them" in missing_text(ranks, "tcp://h:1", 5)
    ranks.take(hello(0))
    ranks.take(hello(1, version="0.9"))
    text = missing_text(ranks, "tcp://h:1", 5)
    assert text.startswith(
        "rank 1 of 2 has not joined tcp://h:1 within 5 s (--join-timeout) (joined: rank 0 on host host-0 (process "
        "1000)). Start it on its host, such as: torchrun --nnodes 2 --nproc-per-node 1 "
    )
    assert "-m mgpu.worker --join tcp://h:1 --keys NAME.worker -m MODEL" in text
    assert "--join tcp://HEAD:1 --keys" in missing_text(ranks, "tcp://0.0.0.0:1", 5)
    assert "\nrefused: rank 1 on host host-1 (process 1001): it has mgpu 0.9" in text
