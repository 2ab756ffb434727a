"""RMS norms of the library's modules, computed by mgpu's: one kernel instead of six operations.

Which modules are such norms is found by trying: a class may compute anything under this name.
"""

# T tokens, D dimensions of the norm

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.loaders.reader import WeightReader

_TRIED = 3
"""Rows that a norm is tried with."""


class CalledNorm(nn.Module):
    """A norm of mgpu, called as a module of the library, with any number of dimensions before the last."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(-1, x.shape[-1])).view(x.shape)


@dataclass
class NamedNorm(Module):
    """A norm of mgpu and the name of its tensor."""

    norm: RMSNorm
    name: str

    def load(self, reader: WeightReader) -> None:
        self.norm.load(reader, self.name)


def replace_norms(base: Any, storage: Storage, prefix: str) -> list[NamedNorm]:
    """Replace every RMS norm below a module; return the new ones."""
    known: dict[tuple[object, ...], bool | None] = {}
    parts: list[NamedNorm] = []
    for name, module in list(base.named_modules()):
        size, eps = _size_and_eps(module)
        if not size:
            continue
        kind = (type(module), size, eps)
        if kind not in known:
            known[kind] = unit_offset_of(module)
        if (unit_offset := known[kind]) is None:
            continue
        part = NamedNorm(RMSNorm(size, eps, storage.dtype, storage.device, unit_offset), f"{prefix}{name}")
        parts.append(part)
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, CalledNorm(part.norm))
    return parts


def unit_offset_of(module: nn.Module) -> bool | None:
    """Return whether an RMS norm adds 1 to its weight; None if the module is none."""
    size, eps = _size_and_eps(module)
    if not size:
        return None
    generator = torch.Generator().manual_seed(0)
    x_TD, weight_D = (torch.randn(shape, generator=generator) for shape in ((_TRIED, size), (size,)))
    with torch.inference_mode():
        tried = copy.deepcopy(module).to_empty(device="cpu").float()
        tried.get_parameter("weight").copy_(weight_D)
        try:
            y_TD = tried(x_TD)
        except (RuntimeError, TypeError):  # a module of another kind, which takes other arguments
            return None
        unit_TD = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
        for unit_offset in (False, True):
            expected_TD = unit_TD * (weight_D + unit_offset)
            if y_TD.shape == expected_TD.shape and torch.allclose(y_TD, expected_TD, rtol=1e-4, atol=1e-5):
                return unit_offset
    return None


def _size_and_eps(module: nn.Module) -> tuple[int, float]:
    """Return the size of what looks like an RMS norm: one vector of weights, and an epsilon. (0, 0.0) else."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or [*parameters] != ["weight"] or parameters["weight"].dim() != 1:
        return 0, 0.0
    return parameters["weight"].numel(), eps
