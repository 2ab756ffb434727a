"""Launch what passes between ranks: sums, choices of tokens, activations and letters."""

from itertools import product

import torch
from torch import Tensor

from mgpu.worker.kernels import runtime
from mgpu.worker.kernels.layers.float8_quantize import empty_words
from mgpu.worker.kernels.peers.activations import ActivationReceiver, ActivationSender, InboxShape
from mgpu.worker.kernels.peers.all_reduce import OneShot, Residual
from mgpu.worker.kernels.peers.exchange import Exchange, best_of_ranks
from mgpu.worker.kernels.peers.host_shot import HostShot
from mgpu.worker.kernels.peers.memory import AreaShape, PeerAlarm, buffer_bytes, cut
from mgpu.worker.kernels.peers.sent_product import SentProduct
from mgpu.worker.kernels.peers.token_mail import Mailbox, Postman
from mgpu.worker.kernels.peers.two_shot import TwoShot, two_shot_divides

ROWS = 512
HIDDEN = (576, 4096, 16384)


def launch_sums() -> None:
    for ranks in (2, 8):
        for dim, dtype in product(HIDDEN, (torch.bfloat16, torch.float32)):
            _sums(ranks, dim, dtype)
        _choices(ranks)
    for dim in HIDDEN:
        _relay(dim, torch.bfloat16)
    _letters()


def _alarm() -> PeerAlarm:
    return PeerAlarm(_ints(1), _ints(1), 1000)


def _ints(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def _areas(ranks: int, shapes: list[AreaShape]) -> list[Tensor]:
    mine = torch.zeros(buffer_bytes(shapes), dtype=torch.uint8)
    return cut(mine, [mine.data_ptr()] * ranks, shapes)


def _sums(ranks: int, dim: int, dtype: torch.dtype) -> None:
    sizes = ranks, ROWS, dim, dtype
    one, parts, sums = _areas(ranks, OneShot.shapes(*sizes) + TwoShot.shapes(*sizes))
    part_TD, weight_D = torch.zeros(ROWS, dim, dtype=dtype), torch.zeros(dim, dtype=dtype)
    one_shot = OneShot(one, _alarm(), 0, ROWS, dim)
    kinds = [one_shot, HostShot(one, _alarm(), 0, ROWS, dim)]
    if two_shot_divides(ranks, dim, dtype):
        kinds.append(TwoShot(parts, sums, _alarm(), 0, ROWS, dim))
    for add_up in kinds:
        for bias_D in (None, weight_D):
            add_up(part_TD, part_TD, None, bias_D)
            add_up(part_TD, part_TD, Residual(part_TD, weight_D, 1e-5), bias_D)
        if dtype is torch.bfloat16 and dim % 128 == 0 and runtime.has_float8(part_TD.device):
            words, scale_T = empty_words(ROWS, dim, part_TD.device)
            add_up(part_TD, words, Residual(part_TD, weight_D, 1e-5), None, scale_T)
    if ranks == 2:
        sent = SentProduct(one_shot)
        sent.send(torch.zeros(1, dim, dtype=dtype), torch.zeros(dim, dim, dtype=dtype))
        sent.add_up(part_TD[:1], Residual(part_TD[:1], weight_D, 1e-5), None)
        sent.add_up(part_TD[:1], None, None)


def _choices(ranks: int) -> None:
    (pairs,) = _areas(ranks, Exchange.shapes(ranks, ROWS))
    exchange, tokens = Exchange(pairs, _alarm(), 0, ROWS), torch.zeros(ROWS, 64, dtype=torch.int32)
    scores_S, ids_S = torch.zeros(ROWS), _ints(ROWS)
    exchange(scores_S, ids_S, 1000)
    exchange(scores_S, ids_S, 1000, ids_S, ids_S, tokens)
    best_of_ranks(torch.zeros(ROWS, 2 * ranks, dtype=torch.int32), ranks, 1000, ids_S, ids_S, tokens)


def _relay(dim: int, dtype: torch.dtype) -> None:
    shape = InboxShape(ROWS, dim, 4, dtype)
    memory = torch.zeros(shape.nbytes, dtype=torch.uint8)
    for receivers in (1, 2, 4):
        ActivationSender(shape, (memory.data_ptr(),) * receivers, _ints(ROWS))(
            torch.zeros(ROWS, dim, dtype=dtype), _ints(1)
        )
    receiver = ActivationReceiver(shape, memory.data_ptr(), _ints(ROWS), _alarm())
    receiver(ROWS)
    receiver(ROWS, _ints(1))


def _letters() -> None:
    letters, tokens = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, 64, dtype=torch.int32)
    mailbox, rows = Mailbox(letters.data_ptr(), _alarm()), _ints(ROWS)
    mailbox.fetch(tokens, rows, rows)
    mailbox.fetch(tokens, rows, rows, _ints(1))
    mailbox.expect(tokens, rows, rows, _ints(1))
    for receivers in (1, 2, 4):
        Postman((letters.data_ptr(),) * receivers)(rows, rows, rows, _ints(1), _ints(1))
