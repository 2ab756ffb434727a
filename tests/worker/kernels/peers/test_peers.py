"""Kernels over peer memory: all ranks get the same bits of the right sum, and a peer that never writes is noticed."""

import pytest
import torch

from harness.kernels.peer_checks import DIM, ROWS, Rank, compare, region_bytes
from harness.ranks.rank_processes import outputs, rank_processes
from mgpu.worker.kernels.layers.float8_quantize import as_rows, empty_words
from mgpu.worker.kernels.layers.norm import add_rms_norm_float8
from mgpu.worker.kernels.peers.all_reduce import Residual
from mgpu.worker.kernels.peers.exchange import best_of_ranks
from mgpu.worker.kernels.peers.memory import PeerAlarm

RANKS = 2 if not torch.cuda.is_available() else 3


def test_ranks_as_processes_compute_the_same_bits() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    shared_bytes = RANKS * region_bytes(RANKS, torch.bfloat16)
    with rank_processes("harness.ranks.peer_rank", RANKS, shared_bytes, str(RANKS)) as processes:
        assert [process.read_line() for process in processes] == ["empty\n"] * RANKS
        for process in processes:
            process.write(b"\n")
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


def make_ranks(
    device: torch.device, dtype: torch.dtype, ranks: int, timeout_us: int, on_host: bool = False
) -> list[Rank]:
    """Return all ranks of a group in this process, each with its own buffer on one device, or pinned on the host."""
    where = {"pin_memory": True} if on_host else {"device": device}
    buffers = [torch.zeros(region_bytes(ranks, dtype), dtype=torch.uint8, **where) for _ in range(ranks)]
    addresses = [buffer.data_ptr() for buffer in buffers]

    def alarm() -> PeerAlarm:
        seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        return PeerAlarm(torch.zeros(1, dtype=torch.int32, device=device), seen, timeout_us)

    members = [Rank(rank, ranks, dtype, buffers[rank], addresses, alarm(), device) for rank in range(ranks)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return members


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("on_host", [False, True], ids=["peer memory", "host memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ranks_as_streams_of_one_gpu_compute_the_same_bits_in_graphs(dtype: torch.dtype, on_host: bool) -> None:
    device = torch.device("cuda:0")
    make_ranks(device, dtype, RANKS, timeout_us=1, on_host=on_host)[0].launch()  # compiles, for nobody answers
    members = make_ranks(device, dtype, RANKS, timeout_us=5_000_000, on_host=on_host)
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


def test_the_best_of_gathered_pairs_is_chosen_and_written_to_the_rows(device: torch.device) -> None:
    scores_SR = torch.tensor([[0.5, 2.0], [1.0, 1.0], [-1.0, float("-inf")], [3.0, 4.0]])
    ids_SR = torch.tensor([[3, 12], [7, 11], [5, 10], [1, 13]], dtype=torch.int32)
    pairs_SP = torch.stack([scores_SR.view(torch.int32), ids_SR], dim=-1).view(4, 4).to(device)
    rows_S, positions_S = (torch.tensor(each, device=device) for each in ([2, 0, 1, 0], [4, 1, 3, 0]))
    tokens = torch.full((3, 5), -7, dtype=torch.int32, device=device)
    assert best_of_ranks(pairs_SP, 2, 13, rows_S, positions_S, tokens).tolist() == [12, 7, 5, 13]
    wanted = torch.full((3, 5), -7, dtype=torch.int32)
    wanted[2, 4], wanted[0, 1], wanted[1, 3] = 12, 7, 5  # the last row only fills up a graph's batch
    assert tokens.tolist() == wanted.tolist()


@pytest.mark.parametrize("kernel", ["one_shot", "two_shot", "host_sum"])
def test_a_norm_that_is_quantized_in_the_sum_is_the_quantized_norm(device: torch.device, kernel: str) -> None:
    (alone,) = make_ranks(device, torch.bfloat16, 1, timeout_us=5_000_000 if device.type == "cuda" else 1000)
    part_TD, stream_TD, bias_D, weight_D = (
        torch.randn(size, device=device).bfloat16() for size in ((ROWS, DIM), (ROWS, DIM), (DIM,), (DIM,))
    )
    streams = stream_TD.clone(), stream_TD.clone()
    words, scale_T = empty_words(ROWS, DIM, device)
    getattr(alone, kernel)(part_TD, words, Residual(streams[0], weight_D, 1e-5), bias_D, scale_T)
    wanted = add_rms_norm_float8(streams[1], part_TD + bias_D, weight_D, 1e-5)
    assert torch.equal(*streams)
    assert torch.equal(scale_T, wanted.scale_T)
    assert torch.equal(as_rows(words, scale_T).values.view(torch.uint8), wanted.values.view(torch.uint8))
