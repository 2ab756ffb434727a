"""Random paged caches in which everything that no token may see is NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.worker.kernels.attention.inputs import PagedCache


@dataclass(frozen=True, slots=True)
class Paged:
    k: Tensor
    v: Tensor
    tables: Tensor
    lens: Tensor
    context_lens: list[int]

    def inputs(self, k_scale: float = 1.0, v_scale: float = 1.0) -> PagedCache:
        """Return it as kernels take it."""
        return PagedCache(self.k, self.v, self.tables, self.lens, k_scale, v_scale)


def paged_cache(
    context_lens: list[int], block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Paged:
    """Fill each row's pages, in random order, up to its context; the rest stays NaN."""
    rows, pages = len(context_lens), max(-(-max(context_lens) // block_size), 1) + 1
    k, v = (torch.full((rows * pages + 1, block_size, kv_heads, dim), torch.nan) for _ in range(2))
    tables = torch.randperm(rows * pages + 1)[: rows * pages].view(rows, pages)
    for row, context in enumerate(context_lens):
        places = torch.arange(context)
        for cache in (k, v):
            cache[tables[row, places // block_size], places % block_size] = torch.randn(context, kv_heads, dim)
    tables, lens = (x.to(device, torch.int32) for x in (tables, torch.tensor(context_lens)))
    return Paged(k.to(device, dtype), v.to(device, dtype), tables, lens, context_lens)


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error that rounding explains."""
    return 1e-5 if dtype == torch.float32 else 5e-3


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Return 0 for zeros that should be zeros."""
    assert out.shape == reference.shape
    error = float((out.float() - reference.float()).norm())
    return error and error / float(reference.float().norm())
