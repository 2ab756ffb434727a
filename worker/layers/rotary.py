"""Rotary position embedding: rotate pairs (i, i + K/2) of a head by an angle that grows with the position."""

# T tokens, H heads of this rank, K head dim, P positions

import math

import torch
from torch import Tensor

from mgpu.protocol.model.facts import RopeScaling

Rotation = tuple[Tensor, Tensor]
"""cos and signed sin, [T, 1, K] each; the first half of sin is negative, so that rotating takes one roll."""
Angles = Rotation | Tensor
"""Passed to layers: the rotation of the step's tokens, or for kernels the table of all positions."""


class RotaryEmbedding:
    """The angles of one kind of layer. Computed once per step, shared by all layers of that kind."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> None:
        self.inverse_frequencies = _scaled_frequencies(head_dim, theta, scaling).to(device)
        self._table_PK = torch.empty((0, head_dim), device=device)

    def __call__(self, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
        """Return cos and sin of the positions; the angles are computed in float32 for any dtype."""
        angles_T1F = (positions_T.unsqueeze(1).float() * self.inverse_frequencies).unsqueeze(1)
        sin_T1F = angles_T1F.sin()
        cos_T1F = angles_T1F.cos()
        return torch.cat((cos_T1F, cos_T1F), dim=-1).to(dtype), torch.cat((-sin_T1F, sin_T1F), dim=-1).to(dtype)

    def table(self, num_positions: int) -> Tensor:
        """Return float32 [P, K]: for each position cos of the K / 2 angles, then sin. Kept while it is long enough."""
        if len(self._table_PK) < num_positions:
            positions_P1 = torch.arange(num_positions, device=self.inverse_frequencies.device).unsqueeze(1)
            angles_PF = positions_P1.float() * self.inverse_frequencies
            self._table_PK = torch.cat((angles_PF.cos(), angles_PF.sin()), dim=-1)
        return self._table_PK


def rotate(x_THK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate all heads of all tokens."""
    cos_T1K, sin_T1K = rotation
    return torch.addcmul(x_THK * cos_T1K, x_THK.roll(x_THK.shape[-1] // 2, -1), sin_T1K)


def _scaled_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide the slow frequencies by ``factor``, keep the fast ones, blend in between (Llama 3.1's rule)."""
    wavelengths = 2 * math.pi / frequencies
    low_wavelength = scaling.original_max_position / scaling.low_freq_factor
    high_wavelength = scaling.original_max_position / scaling.high_freq_factor
    share_kept = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    slowed = frequencies / scaling.factor
    blended = (1 - share_kept) * slowed + share_kept * frequencies
    result = torch.where(wavelengths > low_wavelength, slowed, frequencies)
    is_between = (wavelengths <= low_wavelength) & (wavelengths >= high_wavelength)
    return torch.where(is_between, blended, result)
