# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Bring activations into the order of words of eight codes, for products that widen a part of all words at once."""

# T tokens, K input channels

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, wait_for_inputs

ARRANGE_BLOCK = 1024
"""Places per program of `_arrange_kernel`."""


@triton.jit
def _arrange_kernel(x_ptr, out_ptr, K, places, x_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part, word = place % 256 // 32, place % 32
    k = place // 256 * 256 + word // 4 * 32 + part * 4 + word % 4
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0)
    tl.store(out_ptr + row * places + place, x, mask=place < places)


def arrange_rows(x_TK: Tensor, places: int) -> Tensor:
    """Return rows [T, places], zeros past K: place ``i * 32 + j`` of 256 is what part i of word j is multiplied by."""
    tokens, k = x_TK.shape
    out = torch.empty(tokens, places, dtype=x_TK.dtype, device=x_TK.device)
    _arrange_kernel[(tokens, ceil_div(places, ARRANGE_BLOCK))](
        x_TK, out, k, places, x_TK.stride(0), ARRANGE_BLOCK, overlaps_launches(x_TK.device),
        **launch_options(x_TK.device, 4),
    )  # fmt: skip
    return out
