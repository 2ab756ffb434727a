"""Say which weights are multiplied in float8, rounded, and try each format once on a device."""

import logging
from dataclasses import replace
from functools import cache

import torch

from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.layers.float8_quantize import quantize_rows
from mgpu.worker.kernels.products.float8_product import multiplies_float8
from mgpu.worker.kernels.products.rounded_product import LEAST_ROWS, MOST_ROWS, rounded_product
from mgpu.worker.kernels.runtime import LAUNCH_MODE, has_warpgroups
from mgpu.worker.kernels.trials import trial_problem, worst_row_error
from mgpu.worker.kernels.use import may_round_to_float8
from mgpu.worker.quantization.float8_rows import round_rows
from mgpu.worker.quantization.float8_weights import power_of, round_dense
from mgpu.worker.quantization.packing import WORDS, PackedWeight, WeightKind, dequantize
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.random_packed import random_packed

log = logging.getLogger(__name__)

KINDS: tuple[WeightKind, ...] = ("int2", "int3", "int4", "int5", "int6", "nl4", "fp4")
"""Kinds of words of eight codes."""
_TOLERANCE = 5e-2
"""Largest relative error of a row, compared with rows and weights rounded alike. Weights about half-way between two
numbers, which are many in groups of few codes, explain 3.3e-2 (Q3_K on an H200), wrong places 1."""


def takes(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Return True for weights that the products take: words of eight codes, in order, in whole blocks."""
    if weight.kind == "int4" and weight.offsets is None and weight.group % 64 == 0:
        return False  # `float8_words_gemm` is about as fast, and rounds no weight
    if weight.kind not in KINDS or dtype != torch.bfloat16 or weight.order is not None or weight.rows != 1:
        return False
    is_group = weight.group % 32 == 0 or (weight.group == 16 and weight.supers is not None)
    outputs, words = weight.words.shape
    return is_group and words % WORDS == 0 and outputs % 16 == 0  # the library takes multiples of 16


def with_power(weight: PackedWeight, form: WeightFormat, dtype: torch.dtype) -> PackedWeight:
    """Return the weight for products in float8, if it is multiplied so on its device; else as it is.

    Must not be called within the capture of a graph.
    """
    device = weight.words.device
    if not takes(weight, dtype) or not multiplies_rounded(device, form):
        return weight
    if LAUNCH_MODE.compiles_only:  # the weight is undefined
        return replace(weight, power=torch.ones(1, device=device))
    return replace(weight, power=power_of(weight))


def multiplies_rounded(device: torch.device, form: WeightFormat) -> bool:
    """Return whether weights of a format are multiplied so. The first call must not be within a graph's capture."""
    if not has_warpgroups(device) or not multiplies_float8(device) or not may_round_to_float8():
        return False
    if LAUNCH_MODE.compiles_only:
        trial_error(device, form)  # compiles the trial's kernels; the error is of undefined values
        return True
    return _passes_trial(device, form)


@cache
def _passes_trial(device: torch.device, form: WeightFormat) -> bool:
    name = form.source or f"--quant {form.quant}"
    if problem := trial_problem(lambda: trial_error(device, form), _TOLERANCE):
        log.warning("%s is not multiplied in float8: %s", name, problem)
        return False
    log.info(
        "%s: products of %d rows and more round activations and weights to float8 (W8A8); "
        "MGPU_FLOAT8_ROUNDING=0 rounds nothing, and is slower",
        name,
        LEAST_ROWS,
    )
    return True


@torch.inference_mode()
def trial_error(device: torch.device, form: WeightFormat) -> float:
    """Return the distance of small products to plain torch, relative to its norm; infinity if one is not finite."""
    generator = torch.Generator(device).manual_seed(0)
    if form.source:
        weight = random_packed(form, (192,), 768, generator)
    else:
        weight = quantize(torch.randn(192, 768, generator=generator, device=device), form)
    power = torch.ones(1, device=device) if LAUNCH_MODE.compiles_only else power_of(weight)
    weight = replace(weight, power=power)
    worst = 0.0
    for count in (130, MOST_ROWS + 1):
        x_TK = torch.randn(count, 768, generator=generator, device=device)
        x_TK = (x_TK * torch.logspace(-3, 3, count, device=device)[:, None]).bfloat16()
        expected_TN = round_rows(x_TK) @ round_dense(dequantize(weight, torch.float32)).T
        got_TN = rounded_product(quantize_rows(x_TK), weight).scaled().float()
        worst = max(worst, worst_row_error(got_TN, expected_TN))
    return worst
