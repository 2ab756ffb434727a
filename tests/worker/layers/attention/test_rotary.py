"""Rotary angles equal a float64 reference, as a table and per step, scaled or not."""

import pytest
import torch
from torch import Tensor

from mgpu.protocol.checkpoint.rope.rules import linear_divisors, llama3_divisors, yarn_attention, yarn_divisors
from mgpu.protocol.model.attention_facts import RopeScaling
from mgpu.worker.layers.attention.rotary import RotaryEmbedding

CPU = torch.device("cpu")
LENGTH = 131072
KINDS = {
    "default": (128, 1e4, None),
    "large theta": (128, 5e6, None),
    "one pair": (2, 1e4, None),
    "linear": (64, 1e4, RopeScaling(linear_divisors(4.0, 64))),
    "llama3": (128, 5e5, RopeScaling(llama3_divisors(8.0, 1.0, 4.0, 8192, 5e5, 128))),
    "yarn": (128, 1e6, RopeScaling(yarn_divisors(4.0, 32768, 1e6, 128, 32.0, 1.0), yarn_attention(4.0))),
    "longrope": (96, 1e4, RopeScaling((1.0,) * 48, 1.19, tuple(1.0 + 0.5 * i for i in range(48)), 4096)),
}  # fmt: skip


def reference(size: int, theta: float, divisors: tuple[float, ...], positions: list[int]) -> tuple[Tensor, Tensor]:
    """Return cos and sin in float64, [positions, size / 2]."""
    by = divisors or (1.0,) * (size // 2)
    frequencies = torch.tensor([theta ** (-2 * i / size) / by[i] for i in range(size // 2)], dtype=torch.float64)
    angles = torch.tensor(positions, dtype=torch.float64).unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("longest", [4096, LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_angles_equal_the_float64_reference(kind: str, longest: int) -> None:
    size, theta, scaling = KINDS[kind]
    rotary = RotaryEmbedding(size, theta, scaling, CPU)
    positions = [0, 1, 2, 3, 100, 1000, 4095, 4096, 32767, 100_000, LENGTH]
    positions = [position for position in positions if position <= longest]
    divisors = scaling.divisors_for(longest) if scaling else ()
    factor = scaling.attention_factor if scaling else 1.0
    table = rotary.table(longest + 1)[positions].double()
    cos, sin = (part[:, 0].double() for part in rotary(torch.tensor(positions), torch.float32, longest + 1))
    # float32 holds an angle to 2 ** -24 of it; frequency, position and product round once each.
    allowed = (3 * 2.0**-24 * torch.tensor(positions, dtype=torch.float64) + 1e-6).unsqueeze(1) * factor
    right_cos, right_sin = (factor * part for part in reference(size, theta, divisors, positions))
    half = size // 2
    assert ((table[:, :half] - right_cos).abs() <= allowed).all()
    assert ((table[:, half:] - right_sin).abs() <= allowed).all()
    assert ((cos[:, :half] - right_cos).abs() <= allowed).all()
    assert ((sin[:, half:] - right_sin).abs() <= allowed).all()
    assert torch.equal(sin[:, :half], -sin[:, half:])


def test_a_shorter_table_is_part_of_the_longer_one() -> None:
    rotary = RotaryEmbedding(64, 1e4, None, CPU)
    longer = rotary.table(300)
    assert rotary.table(100) is longer
    assert torch.equal(RotaryEmbedding(64, 1e4, None, CPU).table(100), longer[:100])
