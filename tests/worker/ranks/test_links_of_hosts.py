"""What ranks of several hosts connect by, seen from one rank on a GPU that is not there: NCCL, and no peer memory."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.specs import make_facts, make_spec
from mgpu.protocol.internal.worker_messages import Joined
from mgpu.worker.ranks import links
from mgpu.worker.ranks.collectives import DistChannel, DistGroup, ThroughHost

GPU = torch.device("cuda", 0)
FACTS = make_facts(q=4, kv=4, layers=4, hidden=64, width=128, head_dim=16, vocab=1000, context=256)


class OwnKernels(Exception):
    """Peer memory was about to be opened."""


class Met:
    """How a rank of 4 has met the others."""

    def __init__(
        self, patched: pytest.MonkeyPatch, rank: int, sizes: Sequence[int], hosts: tuple[int, ...], transport: str
    ) -> None:
        self.asked: dict[str, Any] = {}
        patched.setattr(links, "start_process_group", lambda *words, **options: self.asked.update(options, words=words))
        patched.setattr(links, "new_groups", lambda stages, _timeout_s: list(stages))
        patched.setattr(links, "capture_problem", lambda *_: "not tried")
        patched.setattr(links._Connector, "_warm_up", lambda *_: None)
        patched.setattr(links, "PeerSetup", self._open)
        joined = Joined(hosts, meeting="epoch 7", opens_store=rank == 0)
        spec = make_spec(FACTS, sizes, transport, device="cuda", joined=joined)  # type: ignore[arg-type]
        self.links = links._Connector(replace(spec, rendezvous=""), rank, GPU).connect()

    def _open(self, *_: object, **__: object) -> None:
        raise OwnKernels


def test_gpus_of_two_hosts_add_up_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    met = Met(monkeypatch, 2, [4], (0, 0, 1, 1), "nccl")
    assert met.asked["nccl_device"] == GPU
    assert (met.asked["meeting"], met.asked["opens_store"], met.asked["words"]) == ("epoch 7", False, ("", 2, 4))
    assert isinstance(met.links.group.inner, DistGroup)
    assert (met.links.relay, met.links.peer_setup) == (None, None)


def test_without_nccl_they_add_up_by_gloo_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    met = Met(monkeypatch, 2, [4], (0, 0, 1, 1), "gloo")
    assert met.asked["nccl_device"] is None
    assert isinstance(met.links.group.inner, ThroughHost)


def test_stages_of_hosts_pass_activations_by_nccl_and_tokens_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links._Connector, "_with_kernels", lambda _self, group, host_group: group)
    met = Met(monkeypatch, 2, [2, 2], (0, 0, 1, 1), "nccl")
    upstream, [token_channel] = met.links.upstream, met.links.tokens_to
    assert isinstance(upstream, DistChannel)
    assert isinstance(token_channel, DistChannel)
    assert (upstream._wire, token_channel._wire) == (GPU, torch.device("cpu"))


def test_a_stage_on_one_host_has_own_kernels_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OwnKernels):
        Met(monkeypatch, 2, [2, 2], (0, 0, 1, 1), "nccl")
    Met(monkeypatch, 2, [2, 2], (0, 1, 2, 3), "nccl")
