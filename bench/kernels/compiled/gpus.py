"""GPUs that kernels are compiled for without having them: what layers and launchers ask a GPU is answered for these."""

import importlib
import math
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mgpu.worker
from bench.kernels.timing import compile_only
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.quantization.packing import KIND_OF, WORDS, PackedWeight

_ALIGNMENT = 256
"""Of memory that CUDA hands out."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU, and what programs may have in shared memory there."""

    capability: int
    shared_bytes: int
    names: str


GPUS = {
    gpu.capability: gpu
    for gpu in (
        Gpu(80, 163 << 10, "A100"),
        Gpu(89, 99 << 10, "RTX 4090, L40S"),
    )
}


def pretend(gpu: Gpu) -> None:
    """Let layers on the CPU launch the kernels that they would launch on the GPU, and launches only compile."""
    compile_only(gpu.capability)
    for module in pkgutil.walk_packages(mgpu.worker.__path__, "mgpu.worker."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    from mgpu.worker.kernels.runtime import LAUNCH_MODE

    LAUNCH_MODE.compiles_only = True
    _answer(_facts_of(gpu))
    _leave_out_libraries()


def _facts_of(gpu: Gpu) -> dict[str, Callable[..., Any]]:
    """Return what functions of the worker answer there, by their names."""
    from mgpu.worker.kernels.products import choose

    return {
        "uses_kernels": lambda device: True,
        "overlaps_launches": lambda device: gpu.capability >= 90,
        "shared_bytes": lambda device: gpu.shared_bytes,
        "has_float8": lambda device: gpu.capability >= 89,
        "dense_product": lambda device: choose.matmul,
        "packed_product": lambda device, form: choose.quantized_matmul,
        "pack": lambda weight: weight,
        "repack": lambda weight, dtype: weight,
        "quantize": _quantized,
        "nibble_words": partial(_words, 8),
        "octet_words": partial(_words, 4),
    }


def _answer(facts: dict[str, Callable[..., Any]]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("mgpu.worker."):
            vars(module).update({fact: answer for fact, answer in facts.items() if fact in vars(module)})


def _leave_out_libraries() -> None:
    """Let products of libraries return zeros: they are no kernels of mgpu, and on the CPU they take long.

    Memory of zeros is asked for and never touched, so that layers of any size take none.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _zeros(*x.shape[:-1], len(weight), dtype=x.dtype)

    def scaled(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
        return _zeros(len(x), weight.shape[1], dtype=torch.bfloat16)

    def numbers(low: int, high: int | Sequence[int], size: Sequence[int] | None = None, **options: Any) -> Tensor:
        return _zeros(high if size is None else size, dtype=options.get("dtype", torch.int64))

    library = torch.nn.functional
    library.linear, library.scaled_mm, torch._scaled_mm = linear, scaled, scaled  # type: ignore[assignment]
    torch.empty = torch.zeros = _zeros  # type: ignore[assignment]
    torch.randint = numbers  # type: ignore[assignment]
    Tensor.new_empty = Tensor.new_zeros = _like  # type: ignore[assignment]
    Tensor.normal_ = Tensor.uniform_ = lambda self, *_, **__: self  # type: ignore[assignment]


def _quantized(weight: Tensor, form: WeightFormat) -> PackedWeight:
    """Return what `quantize` would, without looking at the weight."""
    outputs, inputs = weight.shape
    if form.quant == "4":
        scales = _zeros(outputs, -(-inputs // form.group), dtype=torch.int32)
        return PackedWeight("int4", _words(8, weight), scales, inputs, form.group)
    return PackedWeight(KIND_OF[form.quant], _words(4, weight), _zeros(outputs, 1, dtype=torch.float32), inputs, 0)


def _words(parts: int, codes: Tensor) -> Tensor:
    """Return the words of as many codes, with so many in a word."""
    return _zeros(*codes.shape[:-1], -(-codes.shape[-1] // (parts * WORDS)) * WORDS, dtype=torch.int32)


def _zeros(*sizes: Any, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    dtype = dtype or torch.get_default_dtype()
    octets = np.zeros(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    first = -octets.ctypes.data % _ALIGNMENT
    return torch.from_numpy(octets)[first : len(octets) - _ALIGNMENT + first].view(dtype).view(shape)


def _like(self: Tensor, *sizes: Any, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    return _zeros(*sizes, dtype=dtype or self.dtype)
