"""All kernels of one Llama-3.1-8B decode step in order, on random weights: what the kernels cost together."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.attention.decode import decode_attention
from mgpu.worker.kernels.attention.inputs import PackedHeads, PagedCache
from mgpu.worker.kernels.layers.activation import gated_activation
from mgpu.worker.kernels.layers.norm import add_rms_norm, rms_norm
from mgpu.worker.kernels.products.gemv import GemvTiling, gemv
from mgpu.worker.kernels.runtime import Workspace
from mgpu.worker.kernels.sample import sample

HIDDEN, WIDTH, HEADS, KV_HEADS, DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
BLOCK_SIZE = 64
SHAPES = (
    ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
    (HIDDEN, HEADS * DIM),
    (2 * WIDTH, HIDDEN),
    (HIDDEN, WIDTH),
)

Tilings = Mapping[tuple[int, int], GemvTiling | None]
"""By shape of the weight; no entry or None: the kernel's own choice."""


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
        self.cos_sin = torch.rand(context, DIM, device=device)
        self.embedded = torch.randn(rows, HIDDEN, device=device).to(torch.bfloat16)
        self.workspace = Workspace.create(device)

    def matmul(self, x: Tensor, w: Tensor, tilings: Tilings | None) -> Tensor:
        """Multiply by the library, or for one row by the kernel when tilings are given, even empty ones."""
        if tilings is None or x.shape[0] > 1:
            return F.linear(x, w)
        return gemv(x, w, tiling=tilings.get((w.shape[0], w.shape[1])))

    def gated(self, x: Tensor, w: Tensor, tilings: Tilings | None) -> Tensor:
        if tilings is None or x.shape[0] > 1:
            return gated_activation(F.linear(x, w), "silu")
        return gemv(x, w, gate="silu", tiling=tilings.get((w.shape[0], w.shape[1])))

    def attention(self, qkv: Tensor, layer: int) -> Tensor:
        rows = qkv.shape[0]
        heads = PackedHeads(qkv.view(rows, -1, DIM), self.cos_sin)
        cache = PagedCache(*self.caches[layer], self.tables[:rows], self.lens[:rows])
        out = decode_attention(heads, cache, scale=DIM**-0.5, workspace=self.workspace)
        return out.view(rows, -1)

    def step(self, rows: int, tilings: Tilings | None = None) -> Tensor:
        """Run one step for the first ``rows`` rows and give the chosen tokens."""
        residual = self.embedded[:rows].clone()
        x = rms_norm(residual, self.norm, 1e-5)
        for layer, (qkv_w, out_w, gate_up_w, down_w) in enumerate(self.layers):
            heads = self.attention(self.matmul(x, qkv_w, tilings), layer)
            x = add_rms_norm(residual, self.matmul(heads, out_w, tilings), self.norm, 1e-5)
            x = add_rms_norm(residual, self.matmul(self.gated(x, gate_up_w, tilings), down_w, tilings), self.norm, 1e-5)
        return sample(self.matmul(x, self.head, tilings))[1]


def _compile(device: torch.device, rows: int) -> None:
    chain = DecodeChain(device, 16, 128, 1)
    chain.step(rows, {})


def chain_jobs() -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the jobs of `compile_all` for the kernels of a step."""
    return [(_compile, (rows,)) for rows in (1, 16)]
