# ruff: noqa: B023 - closures are called within the iteration that makes them
"""Time attention to latents, with DeepSeek's sizes."""

import itertools
from collections.abc import Iterator

import torch

from bench.kernels.timing import BF16, Row, graph_us, relative_error, rotate
from mgpu.worker.kernels import reference
from mgpu.worker.kernels.attention.inputs import LatentRows
from mgpu.worker.kernels.attention.latent import latent_attention

RANK, ROTATED, BLOCK = 512, 64, 64
SCALE = 192**-0.5


def latent_attentions() -> Iterator[Row]:
    for (rows, context), heads in itertools.product(((1, 128), (1, 8192), (64, 1024), (256, 1024)), (16, 128)):
        pages = -(-context // BLOCK)
        moved = rows * context * 2.0 * (RANK + ROTATED)
        caches = [
            torch.randn(rows * pages, BLOCK, RANK + ROTATED, device="cuda").to(BF16)
            for _ in range(max(1, min(8, int((256 << 20) // moved))))
        ]
        tables = torch.randperm(rows * pages, device="cuda").to(torch.int32).view(rows, pages)
        where = LatentRows(tables, torch.full((rows,), context, device="cuda", dtype=torch.int32))
        q = torch.randn(rows, heads, RANK + ROTATED, device="cuda").to(BF16)
        out = torch.empty(rows, heads, RANK, device="cuda", dtype=BF16)

        def attend(cache: torch.Tensor) -> None:
            latent_attention(q[..., :RANK], q[..., RANK:], cache, where, scale=SCALE, out_THC=out)

        few = min(rows, 4)
        attend(caches[0])
        latents = caches[0].unsqueeze(2)
        lens, starts = [context] * few, list(range(few + 1))
        expected = reference.paged_attention(q[:few], latents, latents, tables, lens, starts, SCALE)[..., :RANK]
        error = relative_error(out[:few], expected)
        yield Row(f"latents r{rows} c{context} h{heads}", graph_us(rotate(caches, attend, 4)), moved, error=error)
