"""All kernels of one Llama-3.1-8B decode step in order, on random weights: what the kernels cost together."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.activation import gated_activation
from mgpu.worker.kernels.decode_attention import decode_attention
from mgpu.worker.kernels.norm import add_rms_norm, rms_norm
from mgpu.worker.kernels.rope_cache import rope_and_cache
from mgpu.worker.kernels.runtime import Workspace
from mgpu.worker.kernels.sample import sample
from mgpu.worker.kernels.small_gemm import choose_tiling, small_gemm

HIDDEN, WIDTH, HEADS, KV_HEADS, DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
BLOCK_SIZE = 16
SHAPES = (
    ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
    (HIDDEN, HEADS * DIM),
    (2 * WIDTH, HIDDEN),
    (HIDDEN, WIDTH),
)


class DecodeChain:
    """Weights, caches and inputs of a model with up to ``rows`` rows that all have ``context`` tokens."""

    def __init__(self, device: torch.device, rows: int, context: int, layers: int) -> None:
        self.device = device
        sizes = [n * k for n, k in SHAPES]
        flat = torch.empty(layers * sum(sizes) + VOCAB * HIDDEN, dtype=torch.bfloat16, device=device)
        if device.type == "cuda":
            flat.normal_(0.0, 0.02)
        self.weight_bytes = 2.0 * flat.numel()
        parts = flat.split([*(sizes * layers), VOCAB * HIDDEN])
        self.layers = [
            [part.view(shape) for part, shape in zip(parts[4 * i : 4 * i + 4], SHAPES, strict=True)]
            for i in range(layers)
        ]
        self.head = parts[-1].view(VOCAB, HIDDEN)
        self.norm = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
        pages = -(-context // BLOCK_SIZE)
        shape = (rows * pages, BLOCK_SIZE, KV_HEADS, DIM)
        self.caches = [
            (
                torch.zeros(shape, dtype=torch.bfloat16, device=device),
                torch.zeros(shape, dtype=torch.bfloat16, device=device),
            )
            for _ in range(layers)
        ]
        self.tables = torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, pages)
        self.lens = torch.full((rows,), context, dtype=torch.int32, device=device)
        self.positions = torch.full((rows,), context - 1, dtype=torch.int64, device=device)
        self.slots = self.tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        self.cos_sin = torch.rand(context, DIM, device=device)
        self.embedded = torch.randn(rows, HIDDEN, device=device).to(torch.bfloat16)
        self.workspace = Workspace.create(device)

    def matmul(self, x: Tensor, w: Tensor, prefetch: bool, library: bool) -> Tensor:
        if library:
            return F.linear(x, w)
        tiling = dataclasses.replace(choose_tiling(*w.shape, 2), prefetch=prefetch)
        return small_gemm(x, w, tiling=tiling, workspace=self.workspace)

    def step(self, rows: int, prefetch: bool = True, library: bool = False) -> Tensor:
        """Run one step for the first ``rows`` rows and give the chosen tokens."""
        residual = self.embedded[:rows].clone()
        x = rms_norm(residual, self.norm, 1e-5)
        for (qkv_w, out_w, gate_up_w, down_w), (k, v) in zip(self.layers, self.caches, strict=True):
            qkv = self.matmul(x, qkv_w, prefetch, library).view(rows, -1, DIM)
            q = rope_and_cache(qkv, self.cos_sin, self.positions[:rows], self.slots[:rows], k, v)
            heads = decode_attention(
                q, k, v, self.tables[:rows], self.lens[:rows], scale=DIM**-0.5, workspace=self.workspace
            )
            delta = self.matmul(heads.view(rows, -1), out_w, prefetch, library)
            x = add_rms_norm(residual, delta, self.norm, 1e-5)
            hidden = gated_activation(self.matmul(x, gate_up_w, prefetch, library), "silu")
            delta = self.matmul(hidden, down_w, prefetch, library)
            x = add_rms_norm(residual, delta, self.norm, 1e-5)
        return sample(self.matmul(x, self.head, prefetch, library))[1]


def _compile(device: torch.device, rows: int, prefetch: bool) -> None:
    DecodeChain(device, 16, 128, 1).step(rows, prefetch)


def chain_jobs() -> list[tuple[Any, tuple[Any, ...]]]:
    """Give what `compile_all` needs for the kernels of a step."""
    return [(_compile, (rows, prefetch)) for rows in (1, 8) for prefetch in (True, False)]
