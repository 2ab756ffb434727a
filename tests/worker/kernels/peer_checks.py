"""What every rank does in the tests of kernels over peer memory, and what it must get."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.worker.kernels.all_reduce import OneShot, Residual, TwoShot
from mgpu.worker.kernels.exchange import Exchange
from mgpu.worker.peer_memory import AreaShape, PeerAlarm, buffer_bytes, cut

ROWS, DIM, TURNS, VOCAB = 2, 80, 4, 100


def shapes(ranks: int, dtype: torch.dtype) -> list[AreaShape]:
    reduce = OneShot.shapes(ranks, ROWS, DIM, dtype) + TwoShot.shapes(ranks, ROWS, DIM, dtype)
    return reduce + Exchange.shapes(ranks, 70)


def region_bytes(ranks: int, dtype: torch.dtype) -> int:
    return buffer_bytes(shapes(ranks, dtype))


@dataclass
class Rank:
    """One rank's kernels over areas of a buffer."""

    rank: int
    ranks: int
    dtype: torch.dtype
    mine: Tensor
    addresses: list[int]
    alarm: PeerAlarm

    def __post_init__(self) -> None:
        one, parts, sums, pairs = cut(self.mine, self.addresses, shapes(self.ranks, self.dtype))
        self.one_shot = OneShot(one, self.alarm, self.rank, ROWS, DIM)
        self.two_shot = TwoShot(parts, sums, self.alarm, self.rank, ROWS, DIM)
        self.exchange = Exchange(pairs, self.alarm, self.rank, 70)

    def draw(self, seed: int, *sizes: int) -> Tensor:
        x = torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        x.view(-1)[::7] = -0.0  # whose bits mark empty places
        return x.to(self.mine.device)

    def launch(self) -> list[Tensor]:
        """Launch all kinds in turns, with fewer and more rows; `expected` is what they must give."""
        found = []
        for turn in range(TURNS):
            rows = 1 + turn % ROWS
            part_TD = self.draw(turn * 10 + self.rank, rows, DIM)
            weight_D, bias_D = self.draw(1, DIM), self.draw(2, DIM) if turn % 2 else None
            for reduce in (self.one_shot, self.two_shot):
                found.append(reduce(part_TD, torch.empty_like(part_TD), None, bias_D))
                stream_TD = self.draw(3, rows, DIM)
                found.append(reduce(part_TD.clone(), torch.empty_like(part_TD), Residual(stream_TD, weight_D, 1e-5), bias_D))
                found.append(stream_TD)
            scores_SR, ids_SR = self.pairs(turn)
            found.append(
                self.exchange(scores_SR[:, self.rank].contiguous(), ids_SR[:, self.rank].contiguous(), VOCAB - 1)
            )
        return found

    def pairs(self, turn: int) -> tuple[Tensor, Tensor]:
        """Give scores with ties and ids that grow with the rank."""
        count = (1, 70, 5)[turn % 3]
        generator = torch.Generator().manual_seed(turn)
        scores_SR = torch.randint(-1, 2, (count, self.ranks), generator=generator).float() * 0.5
        first_R = torch.arange(self.ranks) * (VOCAB // self.ranks)
        ids_SR = torch.randint(0, VOCAB // self.ranks, (count, self.ranks), generator=generator) + first_R
        return scores_SR.to(self.mine.device), ids_SR.to(torch.int32).to(self.mine.device)

    def expected(self) -> list[Tensor]:
        wanted = []
        for turn in range(TURNS):
            rows = 1 + turn % ROWS
            parts = [self.draw(turn * 10 + rank, rows, DIM).float() for rank in range(self.ranks)]
            total_TD = torch.stack(parts).sum(0).to(self.dtype)
            if turn % 2:
                total_TD += self.draw(2, DIM)
            stream_TD = self.draw(3, rows, DIM) + total_TD
            x_TD = stream_TD.float()
            normed_TD = x_TD * (x_TD.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.draw(1, DIM).float()
            wanted += [total_TD, normed_TD.to(self.dtype), stream_TD] * 2
            scores_SR, ids_SR = self.pairs(turn)
            wanted.append(ids_SR.gather(1, scores_SR.argmax(1, keepdim=True))[:, 0])
        return wanted


def compare(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.dtype is other.dtype
        tolerance = 1e-5 if one.dtype is torch.float32 else 2e-2
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, msg=lambda text: f"{index}: {text}")  # noqa: B023
