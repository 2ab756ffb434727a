"""Activations between stages: every row arrives, in any order of step sizes, and empty slots are waited for."""

import pytest
import torch

from mgpu.worker.kernels.peers.activations import ActivationReceiver, ActivationSender, InboxShape
from mgpu.worker.kernels.peers.memory import PeerAlarm

ROWS, DIM, DEPTH = 3, 80, 2


def make_alarm(device: torch.device, timeout_us: int = 1000) -> PeerAlarm:
    seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    return PeerAlarm(torch.zeros(1, dtype=torch.int32, device=device), seen, timeout_us)


def make_ends(
    device: torch.device, dtype: torch.dtype, receivers: int = 1
) -> tuple[ActivationSender, list[ActivationReceiver], list[torch.Tensor]]:
    shape = InboxShape(ROWS, DIM, DEPTH, dtype)
    memories = [torch.zeros(shape.nbytes, dtype=torch.uint8, device=device) for _ in range(receivers)]
    for memory in memories:
        shape.clear(memory)

    def turns() -> torch.Tensor:
        return torch.zeros(ROWS, dtype=torch.int32, device=device)

    alarm = make_alarm(device)
    sender = ActivationSender(shape, tuple(memory.data_ptr() for memory in memories), turns())
    ends = [ActivationReceiver(shape, memory.data_ptr(), turns(), alarm) for memory in memories]
    return sender, ends, memories


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_steps_of_any_size_arrive_at_every_receiver(device: torch.device, dtype: torch.dtype) -> None:
    sender, ends, memories = make_ends(device, dtype, receivers=2)
    for step, rows in enumerate((3, 1, 2, 3, 3)):
        x_TD = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(step)).to(device, dtype)
        x_TD[:, ::7] = -0.0  # whose bits mark empty slots
        sender(x_TD)
        for end in ends:
            assert torch.equal(end(rows), x_TD)
    assert not int(ends[0].alarm.seen)
    for memory in memories:
        empty = torch.zeros_like(memory)
        sender.shape.clear(empty)
        assert torch.equal(memory, empty), "a reader empties what it has read"


def test_a_sender_may_be_ahead_by_the_depth(device: torch.device) -> None:
    sender, (end,), _ = make_ends(device, torch.float32)
    steps = [torch.full((2, DIM), float(step), device=device) for step in range(DEPTH)]
    for x_TD in steps:
        sender(x_TD)
    for x_TD in steps:
        assert torch.equal(end(2), x_TD)


def test_padding_is_neither_sent_nor_waited_for(device: torch.device) -> None:
    sender, (end,), _ = make_ends(device, torch.float32)
    x_TD = torch.ones(ROWS, DIM, device=device)
    two = torch.tensor([2], dtype=torch.int32, device=device)
    sender(x_TD, two)
    assert end(ROWS, two)[:, 0].tolist() == [1.0, 1.0, 0.0]
    sender(2 * x_TD)  # row 2 is at its first place still, the others at their second
    assert end(ROWS)[:, 0].tolist() == [2.0, 2.0, 2.0]


def test_activations_that_never_come_are_noticed(device: torch.device) -> None:
    _, (end,), _ = make_ends(device, torch.float32)
    end(1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert int(end.alarm.seen) == 1
