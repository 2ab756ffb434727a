"""Whether stages get a relay: all ranks, or none and a note that says why."""

import os

import pytest
import torch

from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.specs import make_facts, make_spec
from mgpu.worker.ranks.links import layout_of
from mgpu.worker.ranks.relay_setup import RelaySetup
from mgpu.worker.ranks.shared_memory import SharedSegment, orders_stores


@pytest.mark.skipif(not orders_stores(), reason="shared memory needs x86-64's store order")
def test_ranks_that_cannot_have_a_relay_all_say_why() -> None:
    spec = make_spec(make_facts(layers=2, hidden=64), [1, 1])
    layout, fd = layout_of(spec), os.memfd_create("mgpu-test")
    os.truncate(fd, layout.total_bytes)

    def open_one(group: ThreadGroup) -> tuple[bool, str]:
        segment = SharedSegment(fd, layout, group.rank, 30.0)
        place = spec.layout.placement.place_of(group.rank)
        setup = RelaySetup(spec, place, segment, layout, torch.device("cpu"))
        opened = setup.open()
        setup.close()
        return opened is None, setup.note

    try:
        for is_none, note in run_ranks(2, open_one):
            assert is_none
            assert note == (
                "activations do not go by own kernels: rank 0: kernels are not used; rank 1: kernels are not used"
            )
    finally:
        os.close(fd)
