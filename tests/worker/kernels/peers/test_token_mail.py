"""Tokens on their way from the last stage to the first: who waits for which letter."""

import pytest
import torch

from mgpu.worker.kernels.peers.memory import PeerAlarm
from mgpu.worker.kernels.peers.token_mail import Mailbox, Postman
from mgpu.worker.ranks.relay import tag_of

ROWS, WIDTH = 5, 9


class Ends:
    """Both ends over one mailbox, and the first stage's table of tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.letters = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        failed = torch.zeros(1, dtype=torch.int32, device=device)
        self.mailbox = Mailbox(self.letters.data_ptr(), PeerAlarm(failed, self.seen, 1000))
        self.post = Postman((self.letters.data_ptr(),))
        self.tokens = torch.arange(ROWS * WIDTH, dtype=torch.int32, device=device).view(ROWS, WIDTH)

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def waited_in_vain(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return bool(self.seen)


def test_tokens_come_to_the_positions_that_expect_them(device: torch.device) -> None:
    ends = Ends(device)
    rows, positions, tag = ends.ints(3, 1), ends.ints(4, 8), ends.ints(tag_of(7))
    ends.mailbox.expect(ends.tokens, rows, positions, tag)
    ends.post(ends.ints(50, 60), rows, positions, tag)
    known = ends.tokens[2, 0].item()
    ends.mailbox.fetch(ends.tokens, ends.ints(3, 2, 1), ends.ints(4, 0, 8))
    assert [ends.tokens[3, 4].item(), ends.tokens[1, 8].item(), ends.tokens[2, 0].item()] == [50, 60, known]
    assert not ends.waited_in_vain()


def test_a_letter_of_an_earlier_request_is_not_taken(device: torch.device) -> None:
    ends = Ends(device)
    row, position = ends.ints(2), ends.ints(3)
    ends.post(ends.ints(50), row, position, ends.ints(tag_of(1)))
    ends.mailbox.expect(ends.tokens, row, position, ends.ints(tag_of(4)))
    ends.mailbox.fetch(ends.tokens, row, position)
    assert ends.waited_in_vain()
    assert 0 <= ends.tokens[2, 3].item() < ROWS * WIDTH, "a lookup with this token must not fail"


@pytest.mark.parametrize("what", ["padding", "disabled"])
def test_rows_that_pad_a_graph_and_steps_that_choose_again_send_nothing(device: torch.device, what: str) -> None:
    ends = Ends(device)
    positions = ends.ints(0 if what == "padding" else 3)
    ends.post(ends.ints(50), ends.ints(2), positions, ends.ints(1), ends.ints(what == "padding"))
    assert not ends.letters.any()


def test_only_the_first_count_rows_wait(device: torch.device) -> None:
    ends = Ends(device)
    ends.mailbox.expect(ends.tokens, ends.ints(2), ends.ints(3), ends.ints(1))
    ends.mailbox.fetch(ends.tokens, ends.ints(1, 2), ends.ints(3, 3), ends.ints(1))
    assert not ends.waited_in_vain()


def test_tags_are_positive_and_differ_among_steps_in_flight() -> None:
    tags = [tag_of(step) for step in (*range(-12, 12), (1 << 30) - 1, 1 << 30)]
    assert min(tags) > 0
    assert len(set(tags[:24])) == 24
    assert max(tags) < 1 << 31
