"""Products with packed weights on the CPU: by mgpu's own kernels if they can be compiled, else by torch's.

mgpu's round activations to 8 bits (`kernels/cpu/tiles.py`). torch's read 5 or 8 bits per weight, widen them in
registers, and take activations in bfloat16. Neither have the layout of `PackedWeight`, so a weight is repacked once,
after loading. torch's take two kinds:

- 4 bits in groups of 32 to 256 inputs: codes c from 0 to 15 stand for ``(c - 8) * scale + middle``, scale and middle in
  bfloat16. The pairs of ``--quant 4`` are exactly that. Scales in float16 lose three bits: at most 0.4 % of a weight's
  distance from the middle of its group, where the rounding to 4 bits itself costs 7 %.
- 8 bits with a scale per output.

Other weights stay as they are and are dequantized for each product. torch's kernels are private to it, so they are used
only after a numeric check.
"""

# T tokens, N outputs, K inputs, G groups of inputs

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mgpu.worker.kernels.cpu import tiles
from mgpu.worker.kernels.cpu.tiles import TiledWeight
from mgpu.worker.quantization.packing import (
    PackedWeight,
    codes,
    dequantize,
    pack_int4,
    pack_int8,
    unpack,
)

log = logging.getLogger(__name__)

_OUTPUTS = 16
"""The kernels take multiples of this many outputs only."""
_GROUPS = (32, 64, 128, 256)
_INNER_TILES = 1
"""An argument of torch's packing that means something on GPUs only."""


@dataclass(frozen=True, slots=True)
class TorchWeight:
    """A weight as torch's kernels take it. ``words`` are opaque: only `multiply` can read them."""

    words: Tensor
    numbers: Tensor
    """bfloat16: scale and middle of each group, [G, N, 2], or a scale per output, [N]."""
    group: int
    """Inputs that share a scale; 0: all of an output, and 8 bits."""

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.numbers.nbytes


CpuWeight = TiledWeight | TorchWeight
"""A repacked weight."""
Held = PackedWeight | CpuWeight
"""What a linear layer holds of a packed weight."""


def repack(weight: PackedWeight, dtype: torch.dtype) -> Held:
    """Return the weight for `multiply`, or as it is if there is no kernel for it."""
    if dtype != torch.bfloat16 or weight.words.device.type != "cpu":
        return weight
    if (held := tiles.tiled(weight)) is not None:
        return held
    if len(weight.words) % _OUTPUTS:
        return weight
    if weight.kind == "int8" and weight.group == 0 and weight.zeros is None and weight.order is None:
        return _repack_int8(weight) if has_kernel("int8") else weight
    is_grouped = weight.group in _GROUPS and weight.k % weight.group == 0 and weight.order is None
    if weight.kind == "int4" and is_grouped and has_kernel("int4"):
        return _repack_int4(weight)
    return weight


def multiply(x_TK: Tensor, weight: CpuWeight, bias_N: Tensor | None = None) -> Tensor:
    """Return ``x @ w.T + bias``."""
    y_TN: Tensor
    if isinstance(weight, TiledWeight):
        y_TN = tiles.multiply(x_TK, weight)
    elif weight.group:
        y_TN = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, weight.words, weight.group, weight.numbers)
    else:
        y_TN = torch.ops.aten._weight_int8pack_mm(x_TK, weight.words, weight.numbers)
    return y_TN if bias_N is None else y_TN.add_(bias_N)


def _repack_int4(weight: PackedWeight) -> TorchWeight:
    codes_NK = codes(weight)[:, : weight.k].to(torch.int32)
    scales_NG, middles_NG = _scales_and_middles(weight)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, _INNER_TILES)
    numbers_NG2 = torch.stack((scales_NG, middles_NG), dim=2).to(torch.bfloat16)
    return TorchWeight(words, numbers_NG2.transpose(0, 1).contiguous(), weight.group)


def _scales_and_middles(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Return float32 [N, G] each: the step between two codes of a group, and what its code 8 stands for."""
    scales_NG, offsets_NG, zero = tiles.steps_of(weight)
    if offsets_NG is None:
        return scales_NG, torch.zeros_like(scales_NG)
    return scales_NG, offsets_NG + (8 - zero) * scales_NG


def _repack_int8(weight: PackedWeight) -> TorchWeight:
    return TorchWeight(unpack(weight).to(torch.int8), weight.scales[:, 0].to(torch.bfloat16), 0)


@cache
def has_kernel(kind: str) -> bool:
    """Try the kernel once; any error or wrong number means that weights stay as they are.

    Without these instructions torch has loops without vectors, which are slower than products with a dense weight.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 128, generator=generator).to(torch.bfloat16)
    if kind == "int4":
        q = torch.randint(-8, 8, (64, 128), generator=generator)
        scales, offsets = torch.rand(2, 64, 4, generator=generator)
        weight = pack_int4(q, scales, offsets, 32)
    else:
        weight = pack_int8(
            torch.randint(-128, 128, (64, 128), generator=generator), torch.rand(64, generator=generator)
        )
    try:
        found = multiply(x, _repack_int4(weight) if kind == "int4" else _repack_int8(weight)).float()
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("torch's %s product is not available: %s", kind, str(error).splitlines()[0])
        return False
    expected = x.float() @ dequantize(weight, torch.float32).T
    return bool((found - expected).abs().max() <= 0.02 * expected.abs().max())
