"""Root-mean-square normalization. Not sharded: every rank holds the whole vector."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta, PartialSum
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.quantization.float8_rows import Activations, Product, ScaledRows, plain, values_and_scale


class RMSNorm(Module):
    """Scale the last dimension to unit root mean square, then by a weight.

    With ``unit_offset`` (Gemma) the checkpoint stores the weight minus 1, and the weight is kept and applied in
    float32, since 1 + w does not survive bfloat16. ``takes_float8`` is that of the linear layer that a sum's norm goes
    into: so many rows are given to it quantized.
    """

    def __init__(
        self, size: int, eps: float, dtype: torch.dtype, device: torch.device, unit_offset: bool = False
    ) -> None:
        self.eps = eps
        self.unit_offset = unit_offset
        self.shape = (size,)
        self.takes_float8: Callable[[int], bool] = lambda rows: False
        self._cpu_eps = torch.tensor(eps)
        self._uses_kernel = uses_kernels(device)
        self._is_plain_cpu = device.type == "cpu" and dtype == torch.float32
        self.weight = torch.ones(size, dtype=torch.float32 if unit_offset else dtype, device=device)

    def __call__(self, x: Product) -> Tensor:
        if isinstance(x, ScaledRows):
            from mgpu.worker.kernels.layers.norm import rms_norm

            return rms_norm(x.values, self.weight, self.eps, x.scale_T)
        if self._is_plain_cpu:
            return self._forward_cpu(x)
        if self._uses_kernel and x.dim() == 2:
            from mgpu.worker.kernels.layers.norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        if x.dtype != self.weight.dtype:
            return F.rms_norm(x.float(), self.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.shape, self.weight, self.eps)

    def _forward_cpu(self, x: Tensor) -> Tensor:
        """Normalize in five small operations; torch composes its own from twice as many on the CPU."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._cpu_eps, length, length, value=1.0 / self.shape[0]).rsqrt_()
        return torch.mul(x, scale).mul_(self.weight)

    def add_and_norm(self, residual_TD: Tensor, delta_TD: Delta | None) -> Activations:
        """Add ``delta`` to ``residual`` in place and give the normalized sum."""
        if isinstance(delta_TD, PartialSum):
            return delta_TD.add_and_norm(residual_TD, self.weight, self.eps)
        if self._uses_kernel and delta_TD is not None:
            return self._add_and_norm_kernel(residual_TD, delta_TD)
        if delta_TD is not None:
            residual_TD.add_(plain(delta_TD))
        normed_TD: Tensor = self(residual_TD)
        return normed_TD

    def _add_and_norm_kernel(self, residual_TD: Tensor, delta_TD: Product) -> Activations:
        delta_TD, scale_T = values_and_scale(delta_TD)
        if self.takes_float8(len(residual_TD)):
            from mgpu.worker.kernels.layers.norm import add_rms_norm_float8

            return add_rms_norm_float8(residual_TD, delta_TD, self.weight, self.eps, scale_T)
        from mgpu.worker.kernels.layers.norm import add_rms_norm

        return add_rms_norm(residual_TD, delta_TD, self.weight, self.eps, scale_T)

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, f"{name}.weight")
        if self.unit_offset and not reader.norms_include_one:
            reader.after(lambda: self.weight.add_(1.0))

    def init_dummy(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

    def weight_bytes(self) -> int:
        return self.weight.nbytes
