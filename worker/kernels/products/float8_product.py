"""Products of float8 rows with packed float8 weights (W8A8), by the library's tensor-core kernels.

The words of a weight, read as float8, are the weight with the channels of each block in another order. Rows are
quantized into the same order, so that the weight needs no second copy. ``torch._scaled_mm`` is not public and differs
between versions, so it is tried once per device before layers rely on it.
"""

# T tokens, K input channels, N output channels

import logging
from functools import cache

import torch
from torch import Tensor

from mgpu.worker.kernels.layers.float8_quantize import quantize_rows
from mgpu.worker.kernels.runtime import LAUNCH_MODE, has_float8
from mgpu.worker.kernels.trials import trial_problem, worst_row_error
from mgpu.worker.quantization.float8_rows import LEAST_ROWS, Float8Rows, UnscaledProduct, round_rows
from mgpu.worker.quantization.packing import PackedWeight, dequantize, pack_fp8

log = logging.getLogger(__name__)

_TOLERANCE = 2e-2
"""Largest relative error of a row of the product, compared with rows rounded alike. Rounding to bfloat16 twice explains
2e-3; a value half-way between two that is rounded the other way may add 1e-2. A wrong layout is off by 1."""


def float8_product(rows: Float8Rows, weight: PackedWeight) -> UnscaledProduct:
    """Multiply by the weight's transpose, in bfloat16.

    All scales of the weight must be the same, as `quantize` makes them, and N a multiple of 16.
    """
    return multiply_float8(rows, weight.words.view(torch.float8_e4m3fn), weight.scales[:1])


def multiply_float8(rows: Float8Rows, weight_NK: Tensor, scale: Tensor) -> UnscaledProduct:
    """Multiply by the transpose of ``weight * scale``, in bfloat16. The weight has channels in the order of rows."""
    values_TN = torch._scaled_mm(
        rows.values,
        weight_NK.t(),
        scale_a=_one(rows.values.device),
        scale_b=scale.view(1, 1),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return UnscaledProduct(values_TN, rows.scale_T)


@cache
def _one(device: torch.device) -> Tensor:
    """Return the constant 1. The trial makes it before any graph is captured, so its memory belongs to no graph."""
    return torch.ones(1, 1, device=device)


def multiplies_float8(device: torch.device) -> bool:
    """Return whether float8 products work here. The first call must not be within the capture of a graph."""
    if not has_float8(device):
        return False
    if LAUNCH_MODE.compiles_only:
        trial_error(device)  # compiles the trial's kernels; the error is of undefined values
        return True
    return _passes_trial(device)


@cache
def _passes_trial(device: torch.device) -> bool:
    if problem := trial_problem(lambda: trial_error(device), _TOLERANCE):
        log.warning("fp8 stays weight-only, float8 products by torch._scaled_mm were tried: %s", problem)
        return False
    log.info("fp8 products of %d rows and more round activations to float8 too (W8A8)", LEAST_ROWS)
    return True


@torch.inference_mode()
def trial_error(device: torch.device) -> float:
    """Return the distance of a small product to plain torch, relative to its norm; infinity if it is not finite."""
    generator = torch.Generator(device).manual_seed(0)
    x_TK, w_NK = (torch.randn(shape, generator=generator, device=device) for shape in ((17, 320), (48, 320)))
    x_TK = (x_TK * torch.logspace(-3, 3, 17, device=device)[:, None]).bfloat16()
    weight = pack_fp8(w_NK.to(torch.float8_e4m3fn), torch.full((48,), 0.37, device=device))
    got_TN = float8_product(quantize_rows(x_TK), weight).scaled().float()
    expected_TN = round_rows(x_TK) @ dequantize(weight, torch.float32).T
    return worst_row_error(got_TN, expected_TN)
