"""What all CUDA graphs of a worker share: one memory pool, since one runs at a time, their inputs, and the sampling."""

import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.worker.kernels.peers.exchange import best_of_ranks
from mgpu.worker.kernels.sample import sample
from mgpu.worker.models.build import DecoderStage
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.ranks.peer_group import PeerGroup, captured_rows, peers_of
from mgpu.worker.ranks.relay import Relay
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable

# R rows of the padded batch, V tokens of this rank's part of the vocabulary, D model dim

HEAD = 4
"""Numbers before the columns of a staged step: how many rows or tokens it has, the tag of the tokens that it chooses,
whether the graph's own choice holds for all of its rows, and padding."""
_BUFFERS = 4
"""Pinned buffers, used in turn: two steps may be in flight."""


class NotCapturable(RuntimeError):
    """A step makes the host wait for the GPU, so no graph can be made of it."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Results of a graph's latest replay. The next replay of any graph overwrites them."""

    logits_RV: Tensor
    """In the model's dtype."""
    ids_R: Tensor
    """int32: the tokens by arg-max, with or without noise. They hold for rows that are `RowSampling.is_simple`; for
    others `ModelRunner` chooses again from the logits."""


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A captured step and the int32 vector on the device that it reads its inputs from."""

    graph: torch.cuda.CUDAGraph
    staged: Tensor
    output: StepOutput | None
    """None on every stage but the last, which alone has logits and chooses."""


Forward = Callable[[Tensor], StepOutput | None]
"""Computes a step from its staged vector."""


class GraphPool:
    """Captures graphs and replays them with new inputs. ``most`` is the longest vector of inputs.

    With ``tries``, steps run code of another library: whether it lets the host wait is tried before it is captured.
    """

    def __init__(self, device: torch.device, most: int, tries: bool = False) -> None:
        self._device = device
        self._tries = tries
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned = [torch.zeros(most, dtype=torch.int32, pin_memory=True) for _ in range(_BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in range(_BUFFERS)]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._captured: list[torch.cuda.CUDAGraph] = []

    @torch.inference_mode()
    def capture(self, length: int, forward: Forward) -> StepGraph:
        """Capture a step over ``length`` staged numbers. With zeros only, the step must change nothing.

        NotCapturable, before anything is captured.
        """
        staged = torch.zeros(length, dtype=torch.int32, device=self._device)
        with _refusing_waits() if self._tries else nullcontext():
            forward(staged)  # compiles and loads kernels, which a capture cannot
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Not torch.cuda.graph: it collects garbage and empties the allocator's cache for each graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = forward(staged)
            finally:
                graph.capture_end()
        self._captured.append(graph)
        return StepGraph(graph, staged, output)

    def replay(self, graph: StepGraph, values: "array[int]") -> StepOutput | None:
        """Copy these values to a step's staged vector, which they fill, and launch it."""
        self._turn = (self._turn + 1) % _BUFFERS
        pinned, copied = self._pinned[self._turn][: len(values)], self._copied[self._turn]
        copied.synchronize()
        pinned.copy_(torch.frombuffer(values, dtype=torch.int32))
        graph.staged.copy_(pinned, non_blocking=True)
        copied.record()
        graph.graph.replay()
        return graph.output

    def release(self) -> None:
        """Destroy all captured graphs; none may run, and none may be replayed any more."""
        for graph in self._captured:
            graph.reset()


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """Raise NotCapturable when an operation of torch would let the host wait for the GPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it does not see every operation that waits; those fail in the capture
            torch.cuda.set_sync_debug_mode("error")
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise NotCapturable(str(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Uncaptured(GraphPool):
    """Launches each step once instead of capturing it."""

    @torch.inference_mode()
    def capture(self, length: int, forward: Forward) -> StepGraph:
        staged = torch.zeros(length, dtype=torch.int32, device=self._device)
        return StepGraph(torch.cuda.CUDAGraph(), staged, forward(staged))


def padded(values: list[int], length: int, filler: int = 0) -> list[int]:
    """Return a column of a staged vector."""
    return [*values, *[filler] * (length - len(values))]


def whole_lines(length: int) -> int:
    """Round a column up so that the next one starts at a multiple of 16 bytes, as kernels expect."""
    return -(-length // 4) * 4


@dataclass(frozen=True, slots=True)
class GraphParts:
    """What all graphs of a rank are made from.

    ``group`` adds up its slice of the layers. ``relay`` connects it with the other stages; None: there is one stage.
    """

    pool: GraphPool
    stage: DecoderStage
    cache: KvCache
    rows: RowTable
    group: TensorParallelGroup
    relay: Relay | None

    @property
    def most_rows(self) -> int:
        """The most rows that a graph may add up."""
        return captured_rows(self.group)

    @property
    def peers(self) -> PeerGroup | None:
        return peers_of(self.group)

    def fetch_tokens(self, rows_N: Tensor, positions_N: Tensor, staged: Tensor) -> None:
        """On the first of several stages: wait for the tokens that the last stage chose for these positions."""
        if self.relay is not None and self.relay.mailbox is not None:
            self.relay.mailbox.fetch(self.rows.tokens, rows_N, positions_N, staged[:1])

    def expect_tokens(self, rows_R: Tensor, positions_R: Tensor, staged: Tensor) -> None:
        """On the first of several stages: note that the last stage will choose tokens for these positions."""
        if self.relay is not None and self.relay.mailbox is not None:
            self.relay.mailbox.expect(self.rows.tokens, rows_R, positions_R, staged[1:2])

    def receive(self, num_tokens: int, staged: Tensor) -> Tensor:
        """Wait for the activations of the stage before, [T, D]."""
        assert self.relay is not None, "a stage that does not embed has a relay"
        assert self.relay.receive is not None
        return self.relay.receive(num_tokens, staged[:1])

    def send(self, x_TD: Tensor, staged: Tensor) -> None:
        """Send activations to the next stage."""
        assert self.relay is not None, "a stage that does not choose has a relay"
        assert self.relay.send is not None
        self.relay.send(x_TD, staged[:1])

    def finish(self, x_RD: Tensor, rows_R: Tensor, positions_R: Tensor, staged: Tensor) -> StepOutput:
        """Compute logits, then choose tokens, greedy or with noise: of several ranks the best that any of them finds.

        They are written to the rows for the next step, except for rows whose position is 0. The graph ignores rules and
        filters: where a row has any, `ModelRunner` overwrites the tokens before the next step reads them. With several
        stages they are sent to the first one if they hold for all rows.
        """
        logits_RV = self.stage.raw_logits(x_RD)
        assert self.stage.head is not None, "only the last stage chooses"
        is_whole = self.group.size == 1
        scores_R, ids_R = sample(
            logits_RV,
            first_id=self.stage.head.start,
            rows_S=rows_R,
            positions_S=positions_R,
            temperatures=self.rows.temperatures,
            seeds=self.rows.seeds,
            tokens=self.rows.tokens if is_whole else None,
        )
        if not is_whole:
            last_id = self.stage.head.padded_size - 1
            ids_R = self._best_of_ranks(scores_R, ids_R, last_id, rows_R, positions_R)
        if self.relay is not None and self.relay.post is not None:
            self.relay.post(ids_R, rows_R, positions_R, staged[1:2], staged[2:3])
        return StepOutput(logits_RV, ids_R)

    def _best_of_ranks(
        self, scores_R: Tensor, ids_R: Tensor, last_id: int, rows_R: Tensor, positions_R: Tensor
    ) -> Tensor:
        """Return the best tokens that any rank has found, and write them to the rows."""
        peers, tokens = self.peers, self.rows.tokens
        if peers is not None and len(ids_R) <= peers.limits.choices:
            return peers.exchange(scores_R, ids_R, last_id, rows_R, positions_R, tokens)
        pairs_R2 = torch.stack([scores_R.view(torch.int32), ids_R], dim=-1)
        return best_of_ranks(self.group.all_gather(pairs_R2), self.group.size, last_id, rows_R, positions_R, tokens)
