"""Root-mean-square normalization. Not sharded: every rank holds the whole vector.

How a norm computes is chosen once, when it is built: by Triton kernels, by few operations on the CPU, or by torch.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.cpu import layers as cpu_layers
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.activations import Activations, Product, scaled, values_and_scale
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.quantization.float8_rows import UnscaledProduct

TakesFloat8 = Callable[[int], bool]


class RMSNorm(Module):
    """Scale the last dimension to unit root mean square, then by a weight.

    With ``unit_offset`` (Gemma) the checkpoint stores the weight minus 1, and the weight is kept and applied in
    float32, since 1 + w does not survive bfloat16. ``of_heads``: the norm of query or key heads in plain attention.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        unit_offset: bool = False,
        of_heads: bool = False,
    ) -> None:
        self.eps = eps
        self.unit_offset = unit_offset
        self.takes_float8: TakesFloat8 = lambda rows: False
        """Of the linear layer that a sum's norm goes into: whether so many rows are passed to it quantized."""
        self.weight = torch.ones(size, dtype=torch.float32 if unit_offset else dtype, device=device)
        self._arithmetic: _Arithmetic
        if uses_kernels(device) and not of_heads:  # kernels normalize rows; those of attention normalize heads as well
            self._arithmetic = _Kernels(eps)
        elif device.type == "cpu" and dtype == torch.float32:
            self._arithmetic = _FewOperations(size, eps)
        elif device.type == "cpu" and not unit_offset:
            is_compiled = dtype == torch.bfloat16 and not of_heads and cpu_layers.has_kernels()
            self._arithmetic = _Compiled(size, eps) if is_compiled else _Mirrored(size, eps)
        else:
            self._arithmetic = _Torch(size, eps)

    def __call__(self, x: Product) -> Tensor:
        return self._arithmetic.norm(x, self.weight)

    def add_and_norm(self, residual_TD: Tensor, delta_TD: Delta | None) -> Activations:
        """Add ``delta`` to ``residual`` in place and return the normalized sum."""
        if delta_TD is None:
            return self._arithmetic.norm(residual_TD, self.weight)
        if not isinstance(delta_TD, (Tensor, UnscaledProduct)):
            return delta_TD.add_and_norm(residual_TD, self.weight, self.eps, self.takes_float8(len(residual_TD)))
        return self._arithmetic.add_and_norm(residual_TD, delta_TD, self.weight, self.takes_float8)

    def add_to(self, residual_TD: Tensor, y: Product, factor_1: Tensor | None = None) -> None:
        """Normalize ``y`` and add it to ``residual`` in place, which is multiplied by ``factor`` then."""
        self._arithmetic.add_normed(residual_TD, y, self.weight, factor_1)

    def add_normed_and_norm(self, residual_TD: Tensor, y: Product, norm: "RMSNorm") -> Activations:
        """Add ``y``, normalized by ``norm``, to ``residual`` in place and return the normalized sum."""
        if isinstance(self._arithmetic, _Kernels) and not self.takes_float8(len(residual_TD)):
            return self._arithmetic.add_normed_and_norm(residual_TD, y, (norm.weight, norm.eps), self.weight)
        return self.add_and_norm(residual_TD, norm(y))

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, f"{name}.weight")
        if self.unit_offset and not reader.norms_include_one:
            reader.after(lambda: self.weight.add_(1.0))

    def init_dummy(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

    def weight_bytes(self) -> int:
        return self.weight.nbytes


class _Arithmetic(Protocol):
    def norm(self, x: Product, weight: Tensor) -> Tensor: ...

    def add_and_norm(
        self, residual_TD: Tensor, delta: Product, weight: Tensor, takes_float8: TakesFloat8
    ) -> Activations: ...

    def add_normed(self, residual_TD: Tensor, y: Product, weight: Tensor, factor_1: Tensor | None) -> None: ...


class _Torch:
    def __init__(self, size: int, eps: float) -> None:
        self._shape = (size,)
        self._eps = eps

    def norm(self, x: Product, weight: Tensor) -> Tensor:
        x = scaled(x)
        if x.dtype != weight.dtype:
            return F.rms_norm(x.float(), self._shape, weight, self._eps).to(x.dtype)
        return F.rms_norm(x, self._shape, weight, self._eps)

    def add_and_norm(
        self, residual_TD: Tensor, delta: Product, weight: Tensor, takes_float8: TakesFloat8
    ) -> Activations:
        return self.norm(residual_TD.add_(scaled(delta)), weight)

    def add_normed(self, residual_TD: Tensor, y: Product, weight: Tensor, factor_1: Tensor | None) -> None:
        residual_TD.add_(self.norm(y, weight))
        if factor_1 is not None:
            residual_TD.mul_(factor_1)


class _FewOperations(_Torch):
    """Normalize float32 in five small operations; torch composes its own from twice as many on the CPU."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self._eps_tensor = torch.tensor(eps)

    def norm(self, x: Product, weight: Tensor) -> Tensor:
        x = scaled(x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps_tensor, length, length, value=1.0 / self._shape[0]).rsqrt_()
        return torch.mul(x, scale).mul_(weight)


class _Mirrored(_Torch):
    """Normalize two-byte numbers on the CPU by torch's layer norm, which is one fused operation there.

    A row beside its negative has a mean of zero, and the variance of both is the mean square of the row.
    """

    def norm(self, x: Product, weight: Tensor) -> Tensor:
        x = scaled(x)
        size = self._shape[0]
        both = F.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=self._eps)
        return both[..., :size] * weight


class _Compiled(_Mirrored):
    """Normalize rows in bfloat16 on the CPU by a kernel, which adds to the residual too."""

    def norm(self, x: Product, weight: Tensor) -> Tensor:
        x = scaled(x)
        if x.dim() != 2 or not cpu_layers.takes_rows(x, weight):
            return super().norm(x, weight)
        return cpu_layers.add_norm(x, None, weight, self._eps)

    def add_and_norm(
        self, residual_TD: Tensor, delta: Product, weight: Tensor, takes_float8: TakesFloat8
    ) -> Activations:
        delta_TD = scaled(delta)
        if not cpu_layers.takes_rows(residual_TD, delta_TD, weight):
            return super().add_and_norm(residual_TD, delta_TD, weight, takes_float8)
        return cpu_layers.add_norm(residual_TD, delta_TD, weight, self._eps)


class _Kernels:
    """Normalize rows [T, D] by Triton kernels, which multiply by the rows' scales and quantize in the same pass."""

    def __init__(self, eps: float) -> None:
        from mgpu.worker.kernels.layers import norm  # imports triton, which machines without a GPU may lack

        self._kernels = norm
        self._eps = eps

    def norm(self, x: Product, weight: Tensor) -> Tensor:
        values_TD, scale_T = values_and_scale(x)
        return self._kernels.rms_norm(values_TD, weight, self._eps, scale_T)

    def add_and_norm(
        self, residual_TD: Tensor, delta: Product, weight: Tensor, takes_float8: TakesFloat8
    ) -> Activations:
        delta_TD, scale_T = values_and_scale(delta)
        if takes_float8(len(residual_TD)):
            return self._kernels.add_rms_norm_float8(residual_TD, delta_TD, weight, self._eps, scale_T)
        return self._kernels.add_rms_norm(residual_TD, delta_TD, weight, self._eps, scale_T)

    def add_normed(self, residual_TD: Tensor, y: Product, weight: Tensor, factor_1: Tensor | None) -> None:
        values_TD, scale_T = values_and_scale(y)
        self._kernels.add_normed(residual_TD, values_TD, weight, self._eps, y_scale_T=scale_T, factor_1=factor_1)

    def add_normed_and_norm(
        self, residual_TD: Tensor, y: Product, before: tuple[Tensor, float], weight: Tensor
    ) -> Tensor:
        """Add ``y``, normalized by the weight and eps of ``before``, and return the normalized sum."""
        values_TD, scale_T = values_and_scale(y)
        out_TD = self._kernels.add_normed(
            residual_TD, values_TD, *before, y_scale_T=scale_T, weight_D=weight, eps=self._eps
        )
        assert out_TD is not None
        return out_TD
