# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Look tokens up in one rank's rows of an embedding: zeros stand in for the tokens of other ranks."""

# T tokens, D model dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

_MOST_BLOCK = 4096


@triton.jit
def _embed_kernel(
    ids_ptr, w_ptr, out_ptr, start, count, D, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    row = tl.load(ids_ptr + token).to(tl.int64) - start
    is_mine = (row >= 0) & (row < count)
    x = tl.load(w_ptr + row * D + d, mask=is_mine & (d < D), other=0.0)
    tl.store(out_ptr + token * D + d, x, mask=d < D)


def embed_rows(ids_T: Tensor, w_VD: Tensor, start: int, count: int) -> Tensor:
    """Return rows ``ids - start`` [T, D] of a contiguous matrix, of which the first ``count`` count; else zeros.

    ``ids`` are int64.
    """
    tokens, dim = len(ids_T), w_VD.shape[1]
    out_TD = torch.empty((tokens, dim), dtype=w_VD.dtype, device=w_VD.device)
    block = min(_MOST_BLOCK, power_of_2(dim))
    _embed_kernel[(tokens, ceil_div(dim, block))](
        ids_T, w_VD, out_TD, start, count, dim, block, overlaps_launches(w_VD.device),
        **launch_options(w_VD.device, max(1, min(8, block // 256))),
    )  # fmt: skip
    return out_TD
