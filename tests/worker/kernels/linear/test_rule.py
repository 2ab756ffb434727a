"""The chunked and the one-token form of the gated delta rule against its definition, in float64."""

import pytest
import torch
from torch import Tensor

from mgpu.worker.kernels.linear import rule

HEADS, KEYS, VALUES = 3, 8, 16


def drawn(tokens: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values, g and beta of a row, in float64."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = draw(tokens, HEADS, KEYS), draw(tokens, HEADS, KEYS)
    q, k = (each / each.norm(dim=-1, keepdim=True) for each in (q, k))
    fading, beta = -strength * draw(tokens, HEADS).exp(), draw(tokens, HEADS).sigmoid()
    return q, k, draw(tokens, HEADS, VALUES), fading, beta


def recurrence(row: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute token by token, and element by element, what the definition says."""
    outputs = []
    for q, k, v, g, beta in zip(*row, strict=True):
        state = state * g.exp().view(-1, 1, 1)
        known = (state * k.unsqueeze(-1)).sum(1)
        state = state + k.unsqueeze(-1) * ((v - known) * beta.unsqueeze(-1)).unsqueeze(1)
        outputs.append((state * q.unsqueeze(-1)).sum(1))
    return torch.stack(outputs), state


@pytest.mark.parametrize("strength", [0.0, 0.01, 30.0], ids=["lasting", "slow", "fast"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
def test_chunks_equal_the_recurrence(tokens: int, strength: float) -> None:
    row, state = drawn(tokens, strength), torch.randn(HEADS, KEYS, VALUES, dtype=torch.float64)
    expected, after = recurrence(row, state)
    out, new = rule.scan(*row, state)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(new, after, atol=1e-9, rtol=1e-9)
    single, changed = rule.scan(*(each.float() for each in row), state.float())
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(changed.double(), after, atol=1e-4, rtol=1e-4)


def test_keys_that_are_all_alike_do_not_overflow() -> None:
    q, _, v, _, _ = drawn(128)
    k = q[:1].expand(128, -1, -1)
    row = q, k, v, torch.zeros(128, HEADS, dtype=torch.float64), torch.ones(128, HEADS, dtype=torch.float64)
    expected, _ = recurrence(row, torch.zeros(HEADS, KEYS, VALUES, dtype=torch.float64))
    out, _ = rule.scan(*(each.float() for each in row), torch.zeros(HEADS, KEYS, VALUES))
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_step_of_many_rows_equals_the_recurrence_of_each() -> None:
    row, states = drawn(5), torch.randn(5, HEADS, KEYS, VALUES, dtype=torch.float64)
    expected = [recurrence(tuple(each[at : at + 1] for each in row), states[at]) for at in range(5)]
    out = rule.step(*row, states)
    torch.testing.assert_close(out, torch.cat([each for each, _ in expected]), atol=1e-9, rtol=0)
    torch.testing.assert_close(states, torch.stack([after for _, after in expected]), atol=1e-9, rtol=0)
