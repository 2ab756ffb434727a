"""Try the kernels of latent attention on a small random case before a worker relies on them."""

# T tokens, H query heads, C components without position, K rotated ones

import torch

from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.worker.attention.interface import AttentionShape, AttentionSpec
from mgpu.worker.attention.triton_backend import TritonBackend
from mgpu.worker.kernels.attention.inputs import NewLatents, has_latent_kernels
from mgpu.worker.kernels.reference import paged_attention, rms_norm, rotate
from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import LayerCache

_EPS = 1e-6


def latent_obstacle(shape: AttentionShape, latent: LatentFacts) -> str | None:
    """Return why there are no kernels for these sizes; None if there are."""
    if shape.kv_cache_dtype == "fp8":
        return "kernels have no float8 cache of latents"
    if not has_latent_kernels(latent.rank, latent.rotated):
        return f"kernels need latents whose parts are powers of two from 16 on, not {latent.rank} and {latent.rotated}"
    return None


@torch.inference_mode()
def latent_error(device: torch.device, shape: AttentionShape, latent: LatentFacts, batch: StepBatch) -> float:
    """Return the distance to plain torch, relative to the norm of the result. The last block of the cache holds NaN."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, rank, rotated = len(batch.positions), latent.rank, latent.rotated

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(shape.dtype)

    blocks, block_size = int(batch.block_tables.max()) + 2, 64
    latents = draw(blocks, block_size, 1, latent.width)
    latents[-1].fill_(torch.nan)
    cache = LayerCache(latents, latents)
    weight_C, table_PK = draw(rank), torch.rand((1 << 10, rotated), generator=generator, device=device) * 2 - 1
    kv_TC, q_THC, q_THK = (
        draw(tokens, latent.width),
        draw(tokens, shape.num_q, rank),
        draw(tokens, shape.num_q, rotated),
    )
    spec = AttentionSpec(latent.width**-0.5, None)
    new = NewLatents(kv_TC, q_THK, weight_C, _EPS, is_interleaved=False)
    out_THC = (
        TritonBackend(has_latents=True).begin_step(batch, block_size).attend_latents(q_THC, new, table_PK, cache, spec)
    )

    angles_TK = table_PK[batch.positions]
    key_TK = rotate(kv_TC[:, None, rank:], angles_TK)[:, 0]
    stored_TC = torch.cat([rms_norm(kv_TC[:, :rank], weight_C, _EPS), key_TK], dim=1).to(shape.dtype)
    latents.flatten(0, 1)[batch.slots, 0] = stored_TC
    queries = torch.cat([q_THC, rotate(q_THK, angles_TK).to(shape.dtype)], dim=2)
    rows = batch.block_tables, batch.context_lens_host, batch.query_starts.tolist()
    expected_THC = paged_attention(queries, latents, latents, *rows, spec.scale)[..., :rank]
    error = float((out_THC.float() - expected_THC).norm() / expected_THC.norm())
    return error if error == error else torch.inf
