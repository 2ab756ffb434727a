"""Products of float8 rows with float8 weights in blocks of 128 x 128 (W8A8), by the library's tensor-core kernels.

As in `float8_product`, the words of the weight are read as float8 with the channels of each block in another order. A
block of 128 channels of a row has a scale of its own, as the checkpoints' own code quantizes activations.
"""

# T tokens, K input channels, N output channels

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.layers.float8_quantize import quantize_blocks
from mgpu.worker.kernels.runtime import LAUNCH_MODE, has_warpgroups
from mgpu.worker.kernels.trials import trial_problem, worst_row_error
from mgpu.worker.quantization.float8_rows import BLOCK, Float8Blocks, round_blocks
from mgpu.worker.quantization.packing import PackedWeight, dequantize, octet_words

log = logging.getLogger(__name__)

LEAST_ROWS = 17
"""Rows from which it is faster than `group_gemm`, which reads as many bytes and rounds no activations."""
OWN_ROWS = 64
"""Rows up to which `block_gemm` is faster on Hopper than the library."""
_TOLERANCE = 2e-2


def takes_blocks(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Return True for weights that `block_product` takes: whole blocks, four of which fill a row of scales."""
    if weight.kind != "fp8" or dtype != torch.bfloat16 or (weight.group, weight.rows) != (BLOCK, BLOCK):
        return False
    return weight.scales.dtype == torch.float32 and len(weight.words) % BLOCK == 0 and weight.k % (4 * BLOCK) == 0


def block_product(x_TK: Tensor, weight: PackedWeight, bias_N: Tensor | None = None) -> Tensor:
    """Quantize rows and multiply them by the weight's transpose, in bfloat16; see `takes_blocks`."""
    rows = quantize_blocks(x_TK)
    if len(x_TK) <= OWN_ROWS and has_own_product(x_TK.device):
        return own_product(rows, len(x_TK), weight, bias_N)
    product_TN = scaled_product(rows, weight)[: len(x_TK)]
    return product_TN if bias_N is None else product_TN.add_(bias_N)


def scaled_product(rows: Float8Blocks, weight: PackedWeight) -> Tensor:
    return F.scaled_mm(
        rows.values,
        weight.words.view(torch.float8_e4m3fn).t(),
        rows.scale_TB,
        F.ScalingType.BlockWise1x128,
        weight.scales.t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def _library_product(rows: Float8Blocks, count: int, weight: PackedWeight) -> Tensor:
    return scaled_product(rows, weight)[:count]


def own_product(rows: Float8Blocks, count: int, weight: PackedWeight, bias_N: Tensor | None = None) -> Tensor:
    from mgpu.worker.kernels.products.warpgroup.block_gemm import block_gemm

    return block_gemm(rows, count, weight, bias_N=bias_N)


def has_own_product(device: torch.device) -> bool:
    """Return whether `block_gemm` works here. The first call must not be within the capture of a graph."""
    return has_warpgroups(device) and (LAUNCH_MODE.compiles_only or _own_passes_trial(device))


@cache
def _own_passes_trial(device: torch.device) -> bool:
    if problem := trial_problem(lambda: trial_error(device, own_product), _TOLERANCE):
        log.warning("FP8 blocks of few rows are multiplied by the library, an own product was tried: %s", problem)
        return False
    return True


def multiplies_blocks(device: torch.device) -> bool:
    """Return whether products in blocks work here. The first call must not be within the capture of a graph."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False  # the library has them for Hopper and later
    has_own_product(device)
    return LAUNCH_MODE.compiles_only or _passes_trial(device)


@cache
def _passes_trial(device: torch.device) -> bool:
    if problem := trial_problem(lambda: trial_error(device, _library_product), _TOLERANCE):
        log.warning("FP8 blocks stay weight-only, float8 products by scaled_mm were tried: %s", problem)
        return False
    log.info("FP8 blocks round the activations of %d rows and more to float8 too (W8A8)", LEAST_ROWS)
    return True


@torch.inference_mode()
def trial_error(device: torch.device, product: Callable[[Float8Blocks, int, PackedWeight], Tensor]) -> float:
    """Return the distance of a small product to plain torch, relative to its norm; infinity if it is not finite."""
    generator = torch.Generator(device).manual_seed(0)
    x_TK, w_NK = (torch.randn(shape, generator=generator, device=device) for shape in ((17, 512), (256, 512)))
    x_TK = (x_TK * torch.logspace(-3, 3, 17, device=device)[:, None]).bfloat16()
    scales = torch.rand(2, 4, generator=generator, device=device) + 0.5
    words = octet_words(w_NK.to(torch.float8_e4m3fn).view(torch.uint8))
    weight = PackedWeight("fp8", words, scales, 512, BLOCK, BLOCK)
    got_TN = product(quantize_blocks(x_TK), len(x_TK), weight).float()
    expected_TN = round_blocks(x_TK) @ dequantize(weight, torch.float32).T
    return worst_row_error(got_TN, expected_TN)
