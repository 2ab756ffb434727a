"""How many tokens the pools of keys and values of a rank hold: as many as its worker will find room for."""

from mgpu.protocol.model.attention_facts import Sight
from mgpu.protocol.model.kv_pools import fewest_pages, has_pages, pool_size
from mgpu.protocol.model.layout import StepLimits


def pool_tokens(
    pool_bytes: int, token_bytes: int, window_bytes: int, sight: Sight, limits: StepLimits, is_asked: bool
) -> tuple[int, int]:
    """Return how many tokens fit, and how many of them layers with a window keep; 0: all.

    ``token_bytes``: of a token in all layers; ``window_bytes``: in layers with a window. Unless the longest request is
    asked for, a pool too small for more than a window holds requests that never leave it.
    """
    size, per_token = limits.block_size, max(0, token_bytes - window_bytes)
    blocks, pages = pool_size(pool_bytes, per_token * size, window_bytes * size, sight, limits)
    if not is_asked and has_pages(sight, limits) and blocks < fewest_pages(sight, limits):
        blocks, pages = pool_size(pool_bytes, token_bytes * size, 0, (None, False), limits)
    return blocks * size, pages * size


def least_window_tokens(sight: Sight, limits: StepLimits) -> int:
    """Return the tokens that layers with a window must have room for; 0: they keep all that the others keep."""
    return fewest_pages(sight, limits) * limits.block_size if has_pages(sight, limits) else 0
