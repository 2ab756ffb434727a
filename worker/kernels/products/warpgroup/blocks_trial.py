"""Say which of GGUF's weights are multiplied by warpgroups, and try each of their types once on a device."""

import logging
from functools import cache

import torch

from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.products.warpgroup import trial
from mgpu.worker.kernels.products.warpgroup.trial import WordsProduct
from mgpu.worker.kernels.runtime import LAUNCH_MODE
from mgpu.worker.kernels.trials import trial_problem, worst_row_error
from mgpu.worker.quantization.packing import WORDS, PackedWeight, WeightKind, dequantize
from mgpu.worker.quantization.random_packed import random_packed

log = logging.getLogger(__name__)

_NAMES: dict[tuple[WeightKind, bool, bool], str] = {
    ("int4", True, False): "Q4_1",
    ("int4", True, True): "Q4_K",
    ("int5", False, False): "Q5_0",
    ("int5", True, False): "Q5_1",
    ("int5", True, True): "Q5_K",
    ("int6", False, True): "Q6_K",
    ("int3", False, True): "Q3_K",
    ("nl4", False, False): "IQ4_NL",
    ("nl4", False, True): "IQ4_XS",
    ("int2", False, True): "Q2_K",
}
"""By kind, whether groups have offsets, and whether scales have scales: what `trial.takes_words` does not take."""
_SOURCES = {GGUF_FORMATS[name].source: name for name in _NAMES.values()}
_TOLERANCE = 1e-2
"""As in `trial`."""


def type_of(weight: PackedWeight, dtype: torch.dtype) -> str:
    """Return the type of GGUF that a weight has, if it is one of those that may be multiplied; else nothing."""
    if dtype != torch.bfloat16 or weight.words.shape[1] % WORDS or weight.order is not None or weight.has_pairs:
        return ""
    name = _NAMES.get((weight.kind, weight.offsets is not None, weight.supers is not None), "")
    return name if name and weight.group == GGUF_FORMATS[name].group else ""


def type_in(form: WeightFormat) -> str:
    """Return the same of a format."""
    return _SOURCES.get(form.source, "")


def blocks_product(device: torch.device, name: str) -> WordsProduct | None:
    """Return the product with words of a type; None where it does not work.

    The first call for a type must not be within the capture of a graph.
    """
    product = trial.words_product(device)
    return product if product and (LAUNCH_MODE.compiles_only or _works(device, name, product)) else None


@cache
def _works(device: torch.device, name: str, product: WordsProduct) -> bool:
    if problem := trial_problem(lambda: trial_error(device, name, product), _TOLERANCE):
        log.warning("%s does without products by warpgroups: %s", name, problem)
        return False
    return True


@torch.inference_mode()
def trial_error(device: torch.device, name: str, product: WordsProduct) -> float:
    """Return the distance of a small product to plain torch, relative to its norm; infinity if it is not finite."""
    generator = torch.Generator(device).manual_seed(0)
    weight = random_packed(GGUF_FORMATS[name], (192,), 768, generator)
    x_TK = torch.randn(9, 768, generator=generator, device=device).bfloat16()
    expected_TN = x_TK.float() @ dequantize(weight, torch.float32).T
    return worst_row_error(product(x_TK, weight, None).float(), expected_TN)
