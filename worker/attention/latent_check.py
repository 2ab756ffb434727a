"""Try the kernels of latent attention on a small random case before a worker relies on them."""

# T tokens, H query heads, P plain components, V value dim, X = P + V, C components of a latent, K rotated ones

import torch

from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.worker.attention.interface import AttentionShape, AttentionSpec
from mgpu.worker.attention.triton_backend import TritonBackend
from mgpu.worker.kernels.attention.inputs import LatentProjections, NewLatents, has_latent_kernels
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
    kv_TC, q_THP, q_THK = (
        draw(tokens, latent.width),
        draw(tokens, shape.num_q, latent.plain),
        draw(tokens, shape.num_q, rotated),
    )
    weight_HXC = draw(shape.num_q, latent.plain + latent.value_dim, rank) * rank**-0.5
    spec, heads = AttentionSpec((latent.plain + rotated) ** -0.5, None), LatentProjections(q_THP, weight_HXC)
    new = NewLatents(kv_TC, q_THK, weight_C, _EPS, is_interleaved=False)
    step = TritonBackend(expanded_bytes=shape.expanded_bytes).begin_step(batch, block_size)
    out_THV = step.attend_latents(heads, new, table_PK, cache, spec)

    angles_TK = table_PK[batch.positions]
    key_TK = rotate(kv_TC[:, None, rank:], angles_TK)[:, 0]
    stored_TC = torch.cat([rms_norm(kv_TC[:, :rank], weight_C, _EPS), key_TK], dim=1).to(shape.dtype)
    latents.flatten(0, 1)[batch.slots, 0] = stored_TC
    absorbed_THC = torch.einsum("thp,hpc->thc", q_THP.float(), weight_HXC[:, : latent.plain].float())
    queries = torch.cat([absorbed_THC, rotate(q_THK, angles_TK)], dim=2)
    rows = batch.block_tables, batch.context_lens_host, batch.query_starts.tolist()
    expected_THC = paged_attention(queries, latents, latents, *rows, spec.scale)[..., :rank]
    expected_THV = torch.einsum("thc,hvc->thv", expected_THC, weight_HXC[:, latent.plain :].float())
    error = float((out_THV.float() - expected_THV).norm() / expected_THV.norm())
    return error if error == error else torch.inf
