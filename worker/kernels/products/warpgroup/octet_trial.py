"""Try once whether int8 weights in groups are multiplied by warpgroups on a device, and say which weights are."""

import logging
from functools import cache

import torch
from torch import Tensor

from mgpu.worker.kernels.products.warpgroup.trial import WordsProduct
from mgpu.worker.kernels.runtime import LAUNCH_MODE, has_warpgroups
from mgpu.worker.kernels.trials import relative_error, trial_problem
from mgpu.worker.quantization.packing import WORDS, PackedWeight, dequantize, octet_words

log = logging.getLogger(__name__)

LEAST_ROWS = 17
"""Rows from which it is measured to be faster than `group_gemm`."""
MOST_ROWS = 2048
"""More rows dequantize the weight once."""
_TOLERANCE = 1e-2
"""Largest relative error. Rounding to bfloat16 explains 3e-3, wrong places in a tile 1."""


def takes_groups(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Return True for int8 weights whose groups are whole parts of words, or whole blocks, in order."""
    if weight.kind != "int8" or weight.is_simple or dtype != torch.bfloat16 or weight.rows != 1:
        return False
    is_shifted = weight.offsets is not None or weight.supers is not None or weight.order is not None
    is_whole = weight.group in (32, 64) or (weight.group > 0 and weight.group % (4 * WORDS) == 0)
    return is_whole and not is_shifted and weight.scales.dtype.is_floating_point and weight.words.shape[1] % WORDS == 0


def groups_product(device: torch.device) -> WordsProduct | None:
    """Return the product by warpgroups; None where it does not work.

    The first call must not be within the capture of a graph.
    """
    if not has_warpgroups(device):
        return None
    return _product if LAUNCH_MODE.compiles_only else _tried(device)


def _product(x_TK: Tensor, weight: PackedWeight, bias_N: Tensor | None) -> Tensor:
    from mgpu.worker.kernels.products.warpgroup.octet_gemm import octet_gemm

    return octet_gemm(x_TK, weight, bias_N=bias_N)


@cache
def _tried(device: torch.device) -> WordsProduct | None:
    if problem := trial_problem(lambda: trial_error(device), _TOLERANCE):
        log.warning("int8 weights in groups do without warpgroups: %s", problem)
        return None
    return _product


@torch.inference_mode()
def trial_error(device: torch.device) -> float:
    """Return the distance of a small product to plain torch, relative to its norm; infinity if it is not finite."""
    generator = torch.Generator(device).manual_seed(0)
    x_TK = torch.randn(130, 512, generator=generator, device=device).bfloat16()
    q_NK = torch.randint(-128, 128, (200, 512), generator=generator, device=device, dtype=torch.int8)
    scales_NG = torch.rand(200, 16, generator=generator, device=device) + 0.5
    weight = PackedWeight("int8", octet_words(q_NK), scales_NG.half(), 512, 32)
    expected_TN = x_TK.float() @ dequantize(weight, torch.float32).T
    return relative_error(_product(x_TK, weight, None).float(), expected_TN)
