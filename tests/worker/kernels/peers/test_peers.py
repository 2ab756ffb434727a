"""Kernels over peer memory: all ranks get the same bits of the right sum, and a peer that never writes is noticed."""

import pytest
import torch

from harness.peer_checks import Rank, compare, region_bytes
from harness.rank_processes import outputs, rank_processes
from mgpu.worker.kernels.peers.memory import PeerAlarm

RANKS = 2 if not torch.cuda.is_available() else 3


def test_ranks_as_processes_compute_the_same_bits() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    shared_bytes = RANKS * region_bytes(RANKS, torch.bfloat16)
    with rank_processes("harness.peer_rank", RANKS, shared_bytes, str(RANKS)) as processes:
        assert [process.stdout.readline() for process in processes if process.stdout] == ["empty\n"] * RANKS
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        digests = set(outputs(processes))
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_a_peer_that_never_writes_is_noticed_once(device: torch.device) -> None:
    own, _peer = make_ranks(device, torch.float32, 2, timeout_us=1000 if device.type == "cuda" else 3)
    x_TD = torch.ones(2, 80, device=device)
    own.one_shot(x_TD, torch.empty_like(x_TD), None, None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert int(own.alarm.seen) == 1
    own.two_shot(x_TD, torch.empty_like(x_TD), None, None)  # and now nothing is waited for
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_ranks(device: torch.device, dtype: torch.dtype, ranks: int, timeout_us: int) -> list[Rank]:
    """Return all ranks of a group in this process, each with its own buffer on one device."""
    buffers = [torch.zeros(region_bytes(ranks, dtype), dtype=torch.uint8, device=device) for _ in range(ranks)]
    addresses = [buffer.data_ptr() for buffer in buffers]

    def alarm() -> PeerAlarm:
        seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        return PeerAlarm(torch.zeros(1, dtype=torch.int32, device=device), seen, timeout_us)

    members = [Rank(rank, ranks, dtype, buffers[rank], addresses, alarm()) for rank in range(ranks)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return members


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ranks_as_streams_of_one_gpu_compute_the_same_bits_in_graphs(dtype: torch.dtype) -> None:
    device = torch.device("cuda:0")
    make_ranks(device, dtype, RANKS, timeout_us=1)[0].launch()  # compiles, for nobody answers
    members = make_ranks(device, dtype, RANKS, timeout_us=5_000_000)
    streams = [torch.cuda.Stream() for _ in members]
    graphs = [torch.cuda.CUDAGraph() for _ in members]
    found = []
    for own, graph, stream in zip(members, graphs, streams, strict=True):
        with torch.cuda.graph(graph, stream=stream):
            found.append(own.launch())
    for _ in range(3):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert not any(int(own.alarm.seen) for own in members), "waited in vain"
        for own, tensors in zip(members, found, strict=True):
            compare(tensors, own.expected())
            assert all(torch.equal(one, other) for one, other in zip(tensors, found[0], strict=True))
