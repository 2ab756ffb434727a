"""Rotary position embedding: rotate pairs (i, i + K/2) of a head by an angle that grows with the position."""

# T tokens, H heads of this rank, K head dim, P positions

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.attention_facts import RopeScaling
from mgpu.worker.kernels.cpu import layers as cpu_layers

Rotation = tuple[Tensor, Tensor]
"""cos and signed sin, [T, 1, K] each; the first half of sin is negative, so that rotating takes one roll."""
Angles = Rotation | Tensor
"""Passed to layers: the rotation of the step's tokens, or for kernels the table of all positions."""


class RotaryEmbedding:
    """The angles of one kind of layer. Computed once per step, shared by all layers of that kind.

    Of a head's K / 2 pairs the first ``rotated`` / 2 turn, as its reader has laid them out; others do not.
    ``num_positions`` is one more than the longest request of the server: LongRoPE's frequencies depend on it.
    """

    def __init__(
        self, head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device, rotated: int | None = None
    ) -> None:
        rotated = head_dim if rotated is None else rotated
        self._scaling = scaling
        factor = 1.0 if scaling is None else scaling.attention_factor
        still = head_dim // 2 - rotated // 2
        self._factor_F = F.pad(torch.full((rotated // 2,), factor), (0, still), value=1.0).to(device)
        divisors = [] if scaling is None else [scaling.divisors, scaling.long_divisors]
        self._frequencies = {
            of: F.pad(inverse_frequencies(rotated, theta, of), (0, still)).to(device) for of in {(), *divisors}
        }
        self._table_PK = torch.empty((0, head_dim), device=device)

    def __call__(self, positions_T: Tensor, dtype: torch.dtype, num_positions: int) -> Rotation:
        """Return cos and sin of the positions; the angles are computed in float32 for any dtype."""
        angles_T1F = (positions_T.unsqueeze(1).float() * self._frequencies_for(num_positions)).unsqueeze(1)
        sin_T1F = angles_T1F.sin() * self._factor_F
        cos_T1F = angles_T1F.cos() * self._factor_F
        return torch.cat((cos_T1F, cos_T1F), dim=-1).to(dtype), torch.cat((-sin_T1F, sin_T1F), dim=-1).to(dtype)

    def table(self, num_positions: int) -> Tensor:
        """Return float32 [P, K]: for each position cos of the K / 2 angles, then sin. Kept while it is long enough."""
        if len(self._table_PK) < num_positions:
            frequencies_F = self._frequencies_for(num_positions)
            positions_P1 = torch.arange(num_positions, device=frequencies_F.device).unsqueeze(1)
            angles_PF = positions_P1.float() * frequencies_F
            angles = angles_PF.cos() * self._factor_F, angles_PF.sin() * self._factor_F
            self._table_PK = torch.cat(angles, dim=-1)
        return self._table_PK

    def _frequencies_for(self, num_positions: int) -> Tensor:
        return self._frequencies[() if self._scaling is None else self._scaling.divisors_for(num_positions - 1)]


def rotate(x_THK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate all heads of all tokens."""
    cos_T1K, sin_T1K = rotation
    if cpu_layers.takes_heads(x_THK, *rotation):
        return cpu_layers.rotate(x_THK, cos_T1K, sin_T1K)
    return torch.addcmul(x_THK * cos_T1K, x_THK.roll(x_THK.shape[-1] // 2, -1), sin_T1K)


def inverse_frequencies(head_dim: int, theta: float, divisors: tuple[float, ...] = ()) -> Tensor:
    """Return float32 [K / 2]: theta's frequencies, each divided by its divisor."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents
    return (frequencies / torch.tensor(divisors, dtype=torch.float64) if divisors else frequencies).float()
