"""Say which weights `warpgroup_gemm` takes, and try once whether it works on a device.

It needs Hopper, and a part of Triton that is experimental.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from mgpu.worker.kernels.runtime import LAUNCH_MODE, has_warpgroups
from mgpu.worker.kernels.trials import relative_error, trial_problem
from mgpu.worker.quantization.packing import WORDS, PackedWeight, dequantize, pack_int4

log = logging.getLogger(__name__)

_TOLERANCE = 1e-2
"""Largest relative error. Rounding to bfloat16 explains 3e-3, wrong places in a tile 1."""
WordsProduct = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]


def takes_words(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Return True for weights that it takes: words of integers of 4 bits, scaled and not shifted by it."""
    if weight.kind != "int4" or dtype != torch.bfloat16 or weight.words.shape[1] % WORDS:
        return False
    if weight.has_pairs:
        return True
    is_shifted = weight.offsets is not None or weight.supers is not None or weight.order is not None
    return weight.scales.dtype.is_floating_point and weight.group % 32 == 0 and not is_shifted


def words_product(device: torch.device) -> WordsProduct | None:
    """Return the product of 4-bit words by warpgroups; None where it does not work.

    The first call must not be within the capture of a graph.
    """
    if not has_warpgroups(device):
        return None
    return _launched(device) if LAUNCH_MODE.compiles_only else _tried(device)


def _product() -> WordsProduct | None:
    try:
        from mgpu.worker.kernels.products.warpgroup.gemm import warpgroup_gemm
    except (ImportError, AttributeError) as failure:
        log.warning("this Triton has no products by warpgroups: %s", failure)
        return None
    return lambda x_MK, weight, bias_N: warpgroup_gemm(x_MK, weight, bias_N=bias_N)


@cache
def _launched(device: torch.device) -> WordsProduct | None:
    """Launch what the trial launches, so that it is compiled: the error is of undefined values."""
    product = _product()
    if product is not None:
        trial_error(device, product)
    return product


@cache
def _tried(device: torch.device) -> WordsProduct | None:
    product = _product()
    if product is None:
        return None
    if problem := trial_problem(lambda: trial_error(device, product), _TOLERANCE):
        log.warning("4-bit products do without warpgroups: %s", problem)
        return None
    return product


@torch.inference_mode()
def trial_error(device: torch.device, product: WordsProduct) -> float:
    """Return the distance of small products to plain torch, relative to their norm; infinity if one is not finite."""
    x_TK = torch.randn(9, 768, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
    worst = 0.0
    for weight in sample_weights(device):
        expected_TN = x_TK.float() @ dequantize(weight, torch.float32).T
        worst = max(worst, relative_error(product(x_TK, weight, None).float(), expected_TN))
    return worst


def sample_weights(device: torch.device) -> tuple[PackedWeight, PackedWeight]:
    """Return small weights of both forms."""
    generator = torch.Generator(device).manual_seed(0)
    q_NK = torch.randint(-8, 8, (192, 768), generator=generator, device=device)
    scales_NG, offsets_NG = (torch.rand(192, 24, generator=generator, device=device) for _ in range(2))
    pairs = pack_int4(q_NK, scales_NG, offsets_NG, 32)
    zeros_NG = torch.randint(-8, 9, (192, 24), generator=generator, device=device, dtype=torch.int8)
    return pairs, replace(pairs, scales=scales_NG.half(), zeros=zeros_NG)
