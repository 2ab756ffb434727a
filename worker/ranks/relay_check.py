"""Try a relay before a server relies on it: links have been seen that hang, or that return wrong data."""

# T tokens, D model dim

import torch
from torch import Tensor

from mgpu.worker.kernels.peers.activations import InboxShape
from mgpu.worker.ranks.relay import Relay, tag_of

_ROUNDS = 3
_SMALL = 5
"""Rows of a decode step; a round sends so many and then as many as an inbox holds."""


@torch.inference_mode()
def load_kernels(relay: Relay, device: torch.device) -> str:
    """Launch every kernel of this rank with nothing to do, so that none is loaded while another rank's kernel waits."""
    none = torch.zeros(1, dtype=torch.int32, device=device)
    if relay.send is not None:
        x_TD = torch.zeros((1, relay.send.shape.dim), dtype=relay.send.shape.dtype, device=device)
        relay.send(x_TD, none)
    if relay.receive is not None:
        relay.receive(1, none)
    if relay.post is not None:
        relay.post(none, none, none, none, none)
    if relay.mailbox is not None:
        relay.mailbox.expect(none[None], none, none, none)
        relay.mailbox.fetch(none[None], none, none, none)
    torch.cuda.synchronize(device)
    return ""


@torch.inference_mode()
def relay_problem(relay: Relay, device: torch.device) -> str:
    """Return what is wrong; empty if rows and tokens arrive as they were sent. All ranks of the plan call this.

    Every stage passes on what it has received, so no stage is further ahead than steps of a server could be.
    """
    for turn in range(_ROUNDS):
        for count in (_SMALL, relay.most_rows):
            rows = min(count, relay.most_rows)
            if problem := _pass_on(relay, turn, rows, device) or _return_tokens(relay, turn, rows, device):
                return f"waited in vain: {problem}" if bool(relay.alarm.seen) else problem
    return ""


def _pass_on(relay: Relay, turn: int, rows: int, device: torch.device) -> str:
    """Compare the rows of the stage before with what the first stage sends, and send them on."""
    shape = (relay.send or relay.receive).shape  # type: ignore[union-attr]  # every stage has one of them
    wanted_TD = _rows(turn, rows, shape, device)
    found_TD = wanted_TD if relay.receive is None else relay.receive(rows)
    if relay.send is not None:
        relay.send(found_TD)
    return "" if torch.equal(found_TD, wanted_TD) else f"{rows} rows did not arrive as sent"


def _rows(turn: int, rows: int, shape: InboxShape, device: torch.device) -> Tensor:
    """Return rows that any GPU computes alike, of whole numbers that every type holds; no two in line are equal."""
    numbers = torch.arange(rows * shape.dim, device=device) * 40503 + 104729 * turn
    return (numbers % 251 - 125).view(rows, shape.dim).to(shape.dtype)


def _return_tokens(relay: Relay, turn: int, rows: int, device: torch.device) -> str:
    """Send a token for each of some rows back to the first stage, which compares them."""
    count = min(rows, _SMALL)
    numbers_S = torch.arange(count, dtype=torch.int32, device=device)
    tag = torch.full((1,), tag_of(2 * turn + (rows == relay.most_rows)), dtype=torch.int32, device=device)
    positions_S, ids_S = torch.ones_like(numbers_S), 7 * numbers_S + turn
    if relay.post is not None:
        relay.post(ids_S, numbers_S, positions_S, tag)
    if relay.mailbox is None:
        return ""
    tokens = torch.zeros((count, 2), dtype=torch.int32, device=device)
    relay.mailbox.expect(tokens, numbers_S, positions_S, tag)
    relay.mailbox.fetch(tokens, numbers_S, positions_S)
    return "" if torch.equal(tokens[:, 1], ids_S) else f"{count} tokens did not come back as sent"
