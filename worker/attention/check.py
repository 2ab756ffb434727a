"""Try the attention kernels on a small random case before a worker relies on them.

Compilers, drivers and GPUs differ, and the output of a broken kernel looks like an answer. The check compiles the same
kernels as the server runs, so it costs little.
"""

# T tokens, R rows, A packed heads, J KV heads, K head dim

from functools import cache

import torch

from mgpu.worker.attention.interface import AttentionShape, AttentionSpec
from mgpu.worker.attention.latent_check import latent_error, latent_obstacle
from mgpu.worker.attention.rule_check import launch_rule
from mgpu.worker.attention.triton_backend import TritonBackend
from mgpu.worker.kernels.reference import paged_attention, rotate
from mgpu.worker.kernels.runtime import power_of_2
from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import LayerCache, stored_dtype, to_stored

_BLOCK_SIZE = 64
_CONTEXTS = (1, 150, 70, 200)
_NEW_TOKENS = (1, 1, 70, 90)
"""A first token, a token of decoding, a whole prompt, and a chunk of a prompt."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@cache
def attention_problem(device: torch.device, shape: AttentionShape) -> str | None:
    """Return what is wrong with the kernels for these heads; None if they agree with plain torch."""
    if shape.wide is not None and (problem := attention_problem(device, shape.wide)) is not None:
        return problem
    if not shape.has_plain_scores:
        return "kernels have no capped scores"
    if shape.latent is not None and (problem := latent_obstacle(shape, shape.latent)) is not None:
        return problem
    least = 32 if shape.kv_cache_dtype == "fp8" else 16  # even and odd halves of float8 are operands of their own
    if shape.latent is None and (shape.head_dim < least or power_of_2(shape.head_dim) != shape.head_dim):
        return f"kernels need a head size that is a power of two from {least} on, not {shape.head_dim}"
    try:
        errors = [_error(device, shape, window) for window in shape.windows]
    except Exception as error:  # a compiler's or driver's failure may be of any type; plain torch still serves
        return f"the kernels failed: {type(error).__name__}: {error}"
    worst = max(errors, default=0.0)  # a stage without layers has no attention
    if worst <= _tolerance(shape):
        return None
    return f"the kernels' result is off by {worst:.1e} of its norm"


def _tolerance(shape: AttentionShape) -> float:
    """Return the largest relative error that rounding explains; products with float8 are computed in float16."""
    if shape.kv_cache_dtype == "fp8":
        return max(_TOLERANCE[torch.float16], _TOLERANCE[shape.dtype])
    return _TOLERANCE[shape.dtype]


def launch_check(device: torch.device, shape: AttentionShape) -> None:
    """Launch the kernels of the check and ignore their results, so that they are compiled."""
    for window in shape.windows:
        _error(device, shape, window)
    if shape.wide is not None:
        launch_check(device, shape.wide)
    if shape.linear is not None:
        launch_rule(device, shape.linear, shape.dtype)


@torch.inference_mode()
def _error(device: torch.device, shape: AttentionShape, window: int | None) -> float:
    """Return the distance to plain torch, relative to the norm of the result; infinity if it is not finite."""
    if shape.latent is not None:
        return latent_error(device, shape, shape.latent, _batch(device, -(-max(_CONTEXTS) // _BLOCK_SIZE)))
    generator = torch.Generator(device).manual_seed(0)
    num_qk = shape.num_q + shape.num_kv
    tokens, dim = sum(_NEW_TOKENS), shape.head_dim
    pages = -(-max(_CONTEXTS) // _BLOCK_SIZE)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(shape.dtype)

    qkv_TAK = draw(tokens, num_qk + shape.num_kv, dim)
    cache_shape = (len(_CONTEXTS) * pages + 1, _BLOCK_SIZE, shape.num_kv, dim)
    kept = stored_dtype(shape.kv_cache_dtype, shape.dtype)
    cache = LayerCache(to_stored(draw(*cache_shape), kept), to_stored(draw(*cache_shape), kept))
    cache.k_NBJK[-1].fill_(torch.nan)
    cache.v_NBJK[-1].fill_(torch.nan)
    table_PK = torch.rand((max(_CONTEXTS), dim), generator=generator, device=device) * 2 - 1
    batch = _batch(device, pages)
    sinks = draw(shape.num_q) if shape.has_sinks else None
    spec = AttentionSpec(dim**-0.5, window, sinks=sinks, in_chunks=shape.in_chunks)
    out_THK = TritonBackend().begin_step(batch, _BLOCK_SIZE).attend_packed(qkv_TAK, None, table_PK, cache, spec)

    turned_THK = rotate(qkv_TAK[:, :num_qk], table_PK[batch.positions])
    cache.write(batch.slots, turned_THK[:, shape.num_q :], qkv_TAK[:, num_qk:])
    expected_THK = paged_attention(
        turned_THK[:, : shape.num_q].to(shape.dtype),
        cache.k_NBJK,
        cache.v_NBJK,
        batch.block_tables,
        list(_CONTEXTS),
        batch.query_starts.tolist(),
        spec.scale,
        window,
        shape.in_chunks,
        sinks,
    )
    error = float((out_THK.float() - expected_THK).norm() / expected_THK.norm())
    return error if error == error else torch.inf


def _batch(device: torch.device, pages: int) -> StepBatch:
    """Lay the rows out over scattered blocks. The last block of the pool belongs to no row and holds NaN."""
    rows = len(_CONTEXTS)
    tables_RP = torch.arange(rows * pages, dtype=torch.int32, device=device).flip(0).view(rows, pages).contiguous()
    positions, slots = [], []
    for row, (context, count) in enumerate(zip(_CONTEXTS, _NEW_TOKENS, strict=True)):
        places = torch.arange(context - count, context, device=device)
        positions.append(places)
        slots.append(tables_RP[row].long()[places // _BLOCK_SIZE] * _BLOCK_SIZE + places % _BLOCK_SIZE)
    starts = torch.tensor((0, *_NEW_TOKENS), device=device).cumsum(0)
    return StepBatch(
        rows=torch.arange(rows, device=device),
        token_ids=torch.cat(positions),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        query_starts=starts.to(torch.int32),
        context_lens=torch.tensor(_CONTEXTS, dtype=torch.int32, device=device),
        block_tables=tables_RP,
        logit_rows=starts[1:] - 1,
        query_lens_host=list(_NEW_TOKENS),
        context_lens_host=list(_CONTEXTS),
    )
