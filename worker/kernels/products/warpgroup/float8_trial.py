"""Try once whether 4-bit words are multiplied by float8 rows on a device; `trial` says which words."""

import logging
from functools import cache

import torch
from torch import Tensor

from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.layers.float8_codes import quantize_spans
from mgpu.worker.kernels.products.warpgroup.trial import WordsProduct, words_product
from mgpu.worker.kernels.runtime import LAUNCH_MODE
from mgpu.worker.kernels.trials import trial_problem, worst_row_error
from mgpu.worker.kernels.use import may_round_to_float8
from mgpu.worker.quantization.float8_rows import round_rows
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.random_packed import random_packed

log = logging.getLogger(__name__)

LEAST_ROWS = 65
"""Rows from which rounding activations to float8 is faster."""
MOST_ROWS = 512
"""More rows dequantize the weight once, and round nothing."""
_TOLERANCE = 3e-2
"""Largest relative error of a row, compared with rows rounded alike. Offsets and sums of activations, which are rounded
to bfloat16, explain 1e-2, wrong places 1."""


def takes_groups(weight: PackedWeight) -> bool:
    """Return True for 4-bit words whose groups are large enough: each adds products up by itself."""
    return not weight.has_pairs and weight.group % 64 == 0


def span_of(weight: PackedWeight) -> int:
    """Return the channels that a product has at once with one scale: those of a group, or a part of them."""
    return 64 if weight.group % 128 else 128


def float8_words_product(device: torch.device) -> WordsProduct | None:
    """Return the product of float8 rows; None where it does not work, or where nothing is to be rounded.

    The first call must not be within the capture of a graph.
    """
    if words_product(device) is None or not may_round_to_float8():
        return None
    return _launched(device) if LAUNCH_MODE.compiles_only else _tried(device)


def _product(x_TK: Tensor, weight: PackedWeight, bias_N: Tensor | None) -> Tensor:
    from mgpu.worker.kernels.products.warpgroup.float8_gemm import float8_words_gemm

    rows = quantize_spans(x_TK, weight.words.shape[1] * 8, span_of(weight))
    return float8_words_gemm(rows, weight, bias_N=bias_N)


@cache
def _launched(device: torch.device) -> WordsProduct:
    """Launch what the trial launches, so that it is compiled: the error is of undefined values."""
    trial_error(device)
    return _product


@cache
def _tried(device: torch.device) -> WordsProduct | None:
    if problem := trial_problem(lambda: trial_error(device), _TOLERANCE):
        log.warning("4-bit weights stay weight-only, products with float8 rows were tried: %s", problem)
        return None
    log.info("4-bit products of %d rows and more in large groups round activations to float8 (W4A8)", LEAST_ROWS)
    return _product


@torch.inference_mode()
def trial_error(device: torch.device) -> float:
    """Return the distance of small products to plain torch, relative to its norm; infinity if one is not finite."""
    generator = torch.Generator(device).manual_seed(0)
    x_TK = torch.randn(130, 768, generator=generator, device=device)
    x_TK = (x_TK * torch.logspace(-3, 3, 130, device=device)[:, None]).bfloat16()
    worst = 0.0
    for group in (64, 128):
        weight = random_packed(
            WeightFormat("4", group, scale_bytes=2, zero_bytes=1, source="GPTQ"), (192,), 768, generator
        )
        assert weight.zeros is not None
        weight.zeros.random_(-8, 9, generator=generator)
        weight.scales.mul_(torch.rand(weight.scales.shape, generator=generator, device=device).add_(0.5))
        expected_TN = round_rows(x_TK) @ dequantize(weight, torch.float32).T
        worst = max(worst, worst_row_error(_product(x_TK, weight, None).float(), expected_TN))
    return worst
