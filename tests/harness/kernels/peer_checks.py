"""What every rank does in the tests of kernels over peer memory, and what it must get."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mgpu.worker.kernels.peers.all_reduce import OneShot, Residual
from mgpu.worker.kernels.peers.exchange import Exchange
from mgpu.worker.kernels.peers.host_shot import HostShot
from mgpu.worker.kernels.peers.memory import AreaShape, PeerAlarm, buffer_bytes, cut
from mgpu.worker.kernels.peers.sent_product import SentProduct
from mgpu.worker.kernels.peers.two_shot import TwoShot

ROWS, DIM, TURNS, VOCAB, MOST_CHOICES = 2, 80, 3, 100, 70
INPUTS = 24


def shapes(ranks: int, dtype: torch.dtype) -> list[AreaShape]:
    sizes = ranks, ROWS, DIM, dtype
    reduce = OneShot.shapes(*sizes) + TwoShot.shapes(*sizes) + OneShot.shapes(*sizes)
    return reduce + Exchange.shapes(ranks, MOST_CHOICES)


def region_bytes(ranks: int, dtype: torch.dtype) -> int:
    return buffer_bytes(shapes(ranks, dtype))


@dataclass(frozen=True)
class Turn:
    """Inputs of all ranks in one turn."""

    parts: list[Tensor]
    stream_TD: Tensor
    weight_D: Tensor
    bias_D: Tensor | None
    inputs: list[Tensor]
    """Of each rank's product of one row."""
    weights: list[Tensor]
    scores_SR: Tensor
    ids_SR: Tensor


def draw_turn(turn: int, ranks: int, dtype: torch.dtype, device: torch.device) -> Turn:
    generator = torch.Generator().manual_seed(turn)

    def draw(*sizes: int) -> Tensor:
        x = torch.randn(sizes, generator=generator).to(dtype)
        x.view(-1)[::7] = -0.0  # whose bits mark empty places
        return x.to(device)

    rows, count = 1 + turn % ROWS, (1, MOST_CHOICES, 5)[turn % 3]
    scores_SR = torch.randint(-1, 2, (count, ranks), generator=generator) * 0.5  # with ties
    first_R = torch.arange(ranks) * (VOCAB // ranks)
    ids_SR = torch.randint(0, VOCAB // ranks, (count, ranks), generator=generator) + first_R
    return Turn(
        [draw(rows, DIM) for _ in range(ranks)],
        draw(rows, DIM),
        draw(DIM),
        draw(DIM) if turn % 2 else None,
        [draw(1, INPUTS) for _ in range(ranks)],
        [draw(DIM, INPUTS) for _ in range(ranks)],
        scores_SR.to(device),
        ids_SR.to(device, torch.int32),
    )


@dataclass
class Rank:
    """One rank's kernels over areas of a buffer."""

    rank: int
    ranks: int
    dtype: torch.dtype
    mine: Tensor
    addresses: list[int]
    alarm: PeerAlarm
    device: torch.device | None = None
    """Where the kernels run, if ``mine`` is pinned memory of the host."""
    turns: list[Turn] = field(init=False)

    def __post_init__(self) -> None:
        one, parts, sums, host, pairs = cut(self.mine, self.addresses, shapes(self.ranks, self.dtype), self.device)
        self.one_shot = OneShot(one, self.alarm, self.rank, ROWS, DIM)
        self.two_shot = TwoShot(parts, sums, self.alarm, self.rank, ROWS, DIM)
        self.host_sum = HostShot(host, self.alarm, self.rank, ROWS, DIM)
        self.sent = SentProduct(self.one_shot)
        self.exchange = Exchange(pairs, self.alarm, self.rank, MOST_CHOICES)
        self.turns = [draw_turn(turn, self.ranks, self.dtype, self.device or self.mine.device) for turn in range(TURNS)]

    def launch(self) -> list[Tensor]:
        """Launch all kinds in turns, with fewer and more rows; `expected` is what they must give."""
        found = []
        for turn in self.turns:
            part_TD = turn.parts[self.rank]
            for reduce in (self.one_shot, self.two_shot, self.host_sum):
                found.append(reduce(part_TD, torch.empty_like(part_TD), None, turn.bias_D))
                stream_TD = turn.stream_TD.clone()
                fused = Residual(stream_TD, turn.weight_D, 1e-5)
                found += [reduce(part_TD, torch.empty_like(part_TD), fused, turn.bias_D), stream_TD]
            found += self._send_products(turn)
            scores_S, ids_S = (pairs[:, self.rank].contiguous() for pairs in (turn.scores_SR, turn.ids_SR))
            found.append(self.exchange(scores_S, ids_S, VOCAB - 1))
        return found

    def _send_products(self, turn: Turn) -> list[Tensor]:
        """Send a product of one row and add it up: alone, then to a residual stream."""
        x_1K, w_DK = turn.inputs[self.rank], turn.weights[self.rank]
        stream_1D = turn.stream_TD[:1].clone()
        self.sent.send(x_1K, w_DK)
        total_1D = self.sent.add_up(torch.empty_like(stream_1D), None, turn.bias_D)
        self.sent.send(x_1K, w_DK)
        fused = Residual(stream_1D, turn.weight_D, 1e-5)
        return [total_1D, self.sent.add_up(torch.empty_like(stream_1D), fused, turn.bias_D), stream_1D]

    def expected(self) -> list[Tensor]:
        wanted = []
        for turn in self.turns:
            wanted += self._sums(turn, turn.parts, turn.stream_TD) * 3
            products = [
                (x_1K.float() @ w_DK.float().T).to(self.dtype)
                for x_1K, w_DK in zip(turn.inputs, turn.weights, strict=True)
            ]
            wanted += self._sums(turn, products, turn.stream_TD[:1])
            wanted.append(turn.ids_SR.gather(1, turn.scores_SR.argmax(1, keepdim=True))[:, 0])
        return wanted

    def _sums(self, turn: Turn, parts: list[Tensor], stream_TD: Tensor) -> list[Tensor]:
        """Return the sum, the norm of the stream that it is added to, and that stream."""
        total_TD = torch.stack([part.float() for part in parts]).sum(0).to(self.dtype)
        if turn.bias_D is not None:
            total_TD = total_TD + turn.bias_D
        stream_TD = stream_TD + total_TD
        x_TD = stream_TD.float()
        normed_TD = x_TD * (x_TD.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * turn.weight_D.float()
        return [total_TD, normed_TD.to(self.dtype), stream_TD]


def compare(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is other.dtype
        tolerance = 1e-5 if one.dtype is torch.float32 else 2e-2
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
