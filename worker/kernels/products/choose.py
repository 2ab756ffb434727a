"""Choose the fastest measured product for a number of rows. Linear layers on CUDA multiply by these functions."""

# T tokens, I inputs, O outputs

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.facts import Activation
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.layers.float8_quantize import quantize_rows
from mgpu.worker.kernels.products.dequantize import dequantize_packed
from mgpu.worker.kernels.products.float8_blocks import LEAST_ROWS, block_product, multiplies_blocks, takes_blocks
from mgpu.worker.kernels.products.gemv import gemv
from mgpu.worker.kernels.products.group_gemm import group_gemm, most_rows
from mgpu.worker.kernels.products.group_gemv import group_gemv
from mgpu.worker.kernels.products.group_parts import takes
from mgpu.worker.kernels.products.integer_gemv import integer_gemv, takes_integers
from mgpu.worker.kernels.products.octet_gemv import octet_gemv, takes_octets
from mgpu.worker.kernels.products.quantized_gemm import quantized_gemm
from mgpu.worker.kernels.products.quantized_gemv import quantized_gemv
from mgpu.worker.kernels.products.rounded_product import LEAST_ROWS as ROUNDED_ROWS
from mgpu.worker.kernels.products.rounded_product import rounded_product
from mgpu.worker.kernels.products.warpgroup import blocks_trial, float8_trial, integer_trial, octet_trial
from mgpu.worker.kernels.products.warpgroup.trial import WordsProduct, takes_words, words_product
from mgpu.worker.quantization.float8_rows import BLOCK
from mgpu.worker.quantization.packing import PackedWeight

WORDS_ROWS = 256
"""Rows up to which products by warpgroups are faster than dequantizing once and a library product."""
BLOCKS_ROWS = 128
"""The same for words of GGUF with offsets, scales of scales or other codes, but for wide matrices of four bits."""
GEMM_ROWS = {"int8": 256, "fp8": 256, "int4": 64}
"""Rows up to which `quantized_gemm` is faster than dequantizing once and a library product."""


def try_products(device: torch.device, form: WeightFormat) -> None:
    """Try the products that a form may use and that not every machine has; later calls remember the outcome."""
    if form.quant == "fp8" and form.group == BLOCK:
        multiplies_blocks(device)
    if form.quant == "4":
        words_product(device)
        float8_trial.float8_words_product(device)
    if name := blocks_trial.type_in(form):
        blocks_trial.blocks_product(device, name)
    if form.quant == "8" and not form.group:
        integer_trial.integer_product(device)
    if form.quant == "8" and form.group:
        octet_trial.groups_product(device)


def matmul(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Multiply by w^T: own kernel for one row, else cuBLAS, which no kernel here beat from two rows on."""
    if x_TI.shape[0] == 1:
        return gemv(x_TI, w_OI, bias_N=bias_O)
    return F.linear(x_TI, w_OI, bias_O)


def quantized_matmul(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """Multiply by the dequantized weight's transpose; many rows dequantize it once, into temporary memory."""
    rows = x_TI.shape[0]
    if weight.power is not None and rows >= ROUNDED_ROWS:
        y_TO = rounded_product(quantize_rows(x_TI), weight).scaled()
        return y_TO if bias_O is None else y_TO.add_(bias_O)
    if rows > 1 and (product := _warpgroup_product(rows, weight, x_TI.dtype)):
        return product(x_TI, weight, bias_O)
    if rows == 1 and takes_one_row(weight):
        return one_row_matmul(x_TI, weight, bias_O)
    if not weight.is_simple:
        return _group_matmul(x_TI, weight, bias_O)
    if rows <= GEMM_ROWS[weight.kind]:
        return quantized_gemm(x_TI, weight, bias_N=bias_O)
    return F.linear(x_TI, dequantize_packed(weight, x_TI.dtype), bias_O)


def most_rows_at_once(weight: PackedWeight, dtype: torch.dtype) -> int:
    """Return how many rows are multiplied without widening the weight as a whole."""
    if octet_trial.takes_groups(weight, dtype) and octet_trial.groups_product(weight.words.device):
        return octet_trial.MOST_ROWS
    return most_rows(weight)


def _warpgroup_product(rows: int, weight: PackedWeight, dtype: torch.dtype) -> WordsProduct | None:
    """Return the product of so many rows that is made by warpgroups, if there is one here."""
    device = weight.words.device
    if takes_words(weight, dtype):
        return _words_product(rows, weight)
    if integer_trial.takes_octets(weight, dtype):
        return integer_trial.integer_product(device) if rows >= integer_trial.LEAST_ROWS else None
    if octet_trial.takes_groups(weight, dtype):
        is_measured = octet_trial.LEAST_ROWS <= rows <= octet_trial.MOST_ROWS
        return octet_trial.groups_product(device) if is_measured else None
    name = blocks_trial.type_of(weight, dtype)
    return _blocks_product(rows, weight, name) if name else None


def _blocks_product(rows: int, weight: PackedWeight, name: str) -> WordsProduct | None:
    """Return the product of so many rows with words of a type of GGUF, if it is one by warpgroups."""
    is_short_and_wide = weight.kind == "int4" and len(weight.words) > 8192
    if rows > (WORDS_ROWS if is_short_and_wide else BLOCKS_ROWS):
        return None
    return blocks_trial.blocks_product(weight.words.device, name)


def _words_product(rows: int, weight: PackedWeight) -> WordsProduct | None:
    """Return the product of so many rows with 4-bit words, if it is one by warpgroups."""
    device = weight.words.device
    is_many = float8_trial.LEAST_ROWS <= rows <= float8_trial.MOST_ROWS
    if is_many and float8_trial.takes_groups(weight):
        product = float8_trial.float8_words_product(device)
        if product is not None:
            return product
    return words_product(device) if rows <= WORDS_ROWS else None


def _group_matmul(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None) -> Tensor:
    """Multiply by a weight whose groups have scales of their own."""
    rows = x_TI.shape[0]
    if rows >= LEAST_ROWS and takes_blocks(weight, x_TI.dtype) and multiplies_blocks(x_TI.device):
        return block_product(x_TI, weight, bias_O)
    if takes(weight) and rows <= most_rows(weight):
        return group_gemm(x_TI, weight, bias_N=bias_O)
    return F.linear(x_TI, dequantize_packed(weight, x_TI.dtype), bias_O)


def takes_one_row(w: Tensor | PackedWeight) -> bool:
    """Return True for weights that `one_row_matmul` takes."""
    return isinstance(w, Tensor) or w.is_simple or takes_octets(w) or (w.kind != "int8" and takes(w))


def one_row_matmul(
    x_1I: Tensor, w: Tensor | PackedWeight, bias_O: Tensor | None, gate: Activation | None = None
) -> Tensor:
    """Multiply a single row; ``gate`` as in `gemv`."""
    if isinstance(w, PackedWeight):
        if takes_integers(w, x_1I.dtype):
            return integer_gemv(x_1I, w, gate=gate, bias_N=bias_O)
        multiply = quantized_gemv if w.is_simple else octet_gemv if takes_octets(w) else group_gemv
        return multiply(x_1I, w, gate=gate, bias_N=bias_O)
    return gemv(x_1I, w, gate=gate, bias_N=bias_O)
