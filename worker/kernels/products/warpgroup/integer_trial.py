"""Try once whether int8 weights are multiplied in integers on a device, and say which weights are."""

import logging
from functools import cache

import torch
from torch import Tensor

from mgpu.worker.kernels.layers.integer_rows import integer_rows
from mgpu.worker.kernels.products.warpgroup.trial import WordsProduct
from mgpu.worker.kernels.runtime import LAUNCH_MODE, has_warpgroups
from mgpu.worker.kernels.trials import trial_problem, worst_row_error
from mgpu.worker.quantization.integer_rows import round_integers
from mgpu.worker.quantization.packing import PackedWeight, dequantize, pack_int8

log = logging.getLogger(__name__)

LEAST_ROWS = 65
"""Rows from which it is faster than `quantized_gemm`, which is bound by reading weights up to there."""
_TOLERANCE = 5e-3
"""Largest relative error of a row. Rounding to bfloat16 explains 2e-3, wrong places 1."""


def takes_octets(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Return True for int8 weights with a scale per output, for activations in bfloat16."""
    return weight.kind == "int8" and weight.is_simple and dtype == torch.bfloat16


def integer_product(device: torch.device) -> WordsProduct | None:
    """Return the product in integers; None where it does not work.

    The first call must not be within the capture of a graph.
    """
    if not has_warpgroups(device):
        return None
    return _product if LAUNCH_MODE.compiles_only else _tried(device)


def _product(x_TK: Tensor, weight: PackedWeight, bias_N: Tensor | None) -> Tensor:
    from mgpu.worker.kernels.products.warpgroup.integer_gemm import integer_gemm

    return integer_gemm(integer_rows(x_TK), weight, bias_N=bias_N)


@cache
def _tried(device: torch.device) -> WordsProduct | None:
    if problem := trial_problem(lambda: trial_error(device), _TOLERANCE):
        log.warning("int8 weights are widened for many rows, products in integers were tried: %s", problem)
        return None
    log.info("int8 products of %d rows and more are of integers, activations of 16 bits", LEAST_ROWS)
    return _product


@torch.inference_mode()
def trial_error(device: torch.device) -> float:
    """Return the distance of a small product to plain torch, relative to its norm; infinity if it is not finite."""
    generator = torch.Generator(device).manual_seed(0)
    x_TK = torch.randn(130, 320, generator=generator, device=device)
    x_TK = (x_TK * torch.logspace(-3, 3, 130, device=device)[:, None]).bfloat16()
    q_NK = torch.randint(-127, 128, (200, 320), generator=generator, device=device, dtype=torch.int8)
    weight = pack_int8(q_NK, torch.rand(200, generator=generator, device=device) + 0.5)
    expected_TN = round_integers(x_TK) @ dequantize(weight, torch.float32).T
    return worst_row_error(_product(x_TK, weight, None).float(), expected_TN)
