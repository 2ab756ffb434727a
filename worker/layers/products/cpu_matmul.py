"""Multiply by a weight on the CPU at the speed of memory.

For few rows a linear layer only streams its weight. On two cores, ``F.linear`` does that at 8 to 11 GB/s in fp32,
oneDNN's own entry at 20 GB/s; with eight rows a weight packed into oneDNN's layout keeps 21 GB/s where a plain one
falls to 13.
The entries are private to torch, so they are used only after a numeric check against ``F.linear``.
"""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

FEWEST_ROWS = 3
"""One and two rows are padded to this many: a packed weight then streams at 30 GB/s instead of 20. Rows of zeros cost
nothing beside the weight, and keep oneDNN off its slow matrix-vector path."""
EXACT_ROWS = 16
_ROW_STEPS = ((EXACT_ROWS, 1), (64, 8), (256, 32), (1 << 30, 128))
"""(most, step): up to ``most`` rows are padded to a multiple of ``step``, a tenth of the work on average."""
PACKED_FOR_ROWS = 64
"""oneDNN lays a weight out for an expected number of rows. Any number works; 64 was fastest for 1 to 512 rows."""


def matmul(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``. The weight may be one that `pack` returned."""
    if weight_OI.device.type != "cpu" or not _onednn_usable(weight_OI.dtype):
        return F.linear(x_TI, weight_OI, bias_O)
    return matmul_repacked(x_TI, weight_OI, bias_O)


def matmul_repacked(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Do the same for a weight that `pack` has changed, without checking for oneDNN again."""
    rows = x_TI.shape[0]
    if FEWEST_ROWS <= rows <= EXACT_ROWS:
        return _onednn(x_TI, weight_OI, bias_O)
    padded = padded_rows(rows)
    if padded > rows:
        return _onednn(F.pad(x_TI, (0, 0, 0, padded - rows)), weight_OI, bias_O)[:rows]
    return _onednn(x_TI, weight_OI, bias_O)


def padded_rows(rows: int) -> int:
    """Return the number of rows, zeros included, that oneDNN multiplies.

    It compiles and keeps a kernel of over half a megabyte for every number of rows of every shape, up to 1024 of them:
    a worker would grow by a gigabyte after prompts of all lengths. So only few numbers of rows are used.
    """
    step = next(step for most, step in _ROW_STEPS if rows <= most)
    return max(FEWEST_ROWS, -(-rows // step) * step)


def _onednn(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return y_TO


def pack(weight_OI: Tensor) -> Tensor:
    """Return a CPU weight in oneDNN's layout, and any other weight as it is.

    The result is opaque: only `matmul` can read it.
    """
    if weight_OI.device.type != "cpu" or not _onednn_usable(weight_OI.dtype):
        return weight_OI
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACKED_FOR_ROWS)
    return packed


@cache
def _onednn_usable(dtype: torch.dtype) -> bool:
    """Try both private entries once per dtype; any error or wrong number means `F.linear` from then on."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).to(dtype)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        results = [torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "") for w in (weight, packed)]
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("oneDNN linear is not available for %s, using F.linear: %s", dtype, str(error).splitlines()[0])
        return False
    expected = F.linear(x, weight, bias)
    tolerance = 1e-4 if dtype == torch.float32 else 0.25
    return all(torch.allclose(result, expected, rtol=tolerance, atol=tolerance) for result in results)
