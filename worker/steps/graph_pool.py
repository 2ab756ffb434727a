"""What all CUDA graphs of a worker share: one memory pool, since one runs at a time, and a way in for their inputs."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.worker.kernels.sample import sample
from mgpu.worker.ranks.peer_group import PeerGroup
from mgpu.worker.state.rows import RowTable

# R rows of the padded batch, V tokens of the vocabulary

_BUFFERS = 4
"""Pinned buffers in turn: two steps may be in flight."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Results of a graph's latest replay, overwritten by the next one of any graph."""

    logits_RV: Tensor
    """In the model's dtype."""
    ids_R: Tensor
    """int32: the choice for rows that need no more than noise."""


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A captured step and the int32 vector on the device that it reads its inputs from."""

    graph: torch.cuda.CUDAGraph
    staged: Tensor
    output: StepOutput


class GraphPool:
    """Captures graphs and feeds them. ``most`` is the longest vector of inputs."""

    def __init__(self, device: torch.device, most: int) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned = [torch.zeros(most, dtype=torch.int32, pin_memory=True) for _ in range(_BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in range(_BUFFERS)]  # type: ignore[no-untyped-call]
        self._turn = 0

    @torch.inference_mode()
    def capture(self, length: int, forward: Callable[[Tensor], StepOutput]) -> StepGraph:
        """Capture a step over ``length`` staged numbers; with all of them 0 it must change nothing."""
        staged = torch.zeros(length, dtype=torch.int32, device=self._device)
        forward(staged)  # compiles and loads what a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Not torch.cuda.graph, which collects garbage and empties the allocator's cache for each graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = forward(staged)
            finally:
                graph.capture_end()
        return StepGraph(graph, staged, output)

    def replay(self, graph: StepGraph, values: "array[int]") -> StepOutput:
        """Launch a step with these inputs, which fill its staged vector."""
        self._turn = (self._turn + 1) % _BUFFERS
        pinned, copied = self._pinned[self._turn][: len(values)], self._copied[self._turn]
        copied.synchronize()
        pinned.copy_(torch.frombuffer(values, dtype=torch.int32))
        graph.staged.copy_(pinned, non_blocking=True)
        copied.record()
        graph.graph.replay()
        return graph.output


class Uncaptured(GraphPool):
    """Launches a step where a graph of it would be captured."""

    @torch.inference_mode()
    def capture(self, length: int, forward: Callable[[Tensor], StepOutput]) -> StepGraph:
        staged = torch.zeros(length, dtype=torch.int32, device=self._device)
        return StepGraph(torch.cuda.CUDAGraph(), staged, forward(staged))


def padded(values: list[int], length: int, filler: int = 0) -> list[int]:
    """Give a column of a staged vector."""
    return [*values, *[filler] * (length - len(values))]


def whole_lines(length: int) -> int:
    """Round a column up so that the next one starts at a multiple of 16 bytes, as kernels expect."""
    return -(-length // 4) * 4


def choose_tokens(
    logits_RV: Tensor, rows_R: Tensor, positions_R: Tensor, rows: RowTable, peers: PeerGroup | None
) -> Tensor:
    """Give tokens, int32 [R], and leave them in ``rows`` for the next step, but for rows whose position is 0."""
    slice_size = logits_RV.shape[1]
    scores_R, ids_R = sample(
        logits_RV,
        first_id=0 if peers is None else peers.rank * slice_size,
        rows_S=rows_R,
        positions_S=positions_R,
        temperatures=rows.temperatures,
        seeds=rows.seeds,
        tokens=rows.tokens if peers is None else None,
    )
    if peers is None:
        return ids_R
    last_id = peers.size * slice_size - 1
    return peers.exchange(scores_R, ids_R, last_id, rows_R, positions_R, rows.tokens)
