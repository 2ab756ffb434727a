"""The learned number that multiplies the residual stream after a layer."""

# T tokens, D model dim

import torch
from torch import Tensor

from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.loaders.reader import WeightReader


class LayerScale(Module):
    """One number of a layer (Gemma 4)."""

    def __init__(self, storage: Storage) -> None:
        self.weight = torch.ones(1, dtype=storage.dtype, device=storage.device)

    def __call__(self, residual_TD: Tensor) -> None:
        residual_TD.mul_(self.weight)

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, name)

    def init_dummy(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

    def weight_bytes(self) -> int:
        return self.weight.nbytes
