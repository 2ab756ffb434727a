"""Products of float8 rows with weights of few bits, rounded to float8: in registers, or all at once for a library.

Many rows take the library's product, of a weight that is written once in float8, in temporary memory.
"""

# T tokens, N outputs

import torch

from mgpu.worker.kernels.products.dequantize_groups import dequantize_float8
from mgpu.worker.kernels.products.float8_product import multiply_float8
from mgpu.worker.quantization.float8_rows import Float8Rows, UnscaledProduct
from mgpu.worker.quantization.packing import PackedWeight

LEAST_ROWS = 65
"""Rows from which rounding is faster."""
MOST_ROWS = 768
"""Rows up to which `rounded_gemm` is faster than the library."""


def rounded_product(rows: Float8Rows, weight: PackedWeight) -> UnscaledProduct:
    """Multiply by the transpose of the weight, which has a ``power``, in bfloat16."""
    assert weight.power is not None, "a weight that `with_power` has returned"
    if len(rows.values) <= MOST_ROWS:
        from mgpu.worker.kernels.products.warpgroup.rounded_gemm import rounded_gemm

        return rounded_gemm(rows, weight)
    return multiply_float8(rows, dequantize_float8(weight), torch.reciprocal(weight.power))
