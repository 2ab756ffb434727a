"""How a rank shares its memory for keys and values between layers that see everything and layers with a window.

A sequence needs all of its blocks in the first, and in the second only those in sight, each in a page
(orchestrator/scheduler/window_pages.py). Both pools are as large as sequences of four windows need, so that those use
up both at once: shorter ones then use up the pages, longer ones the blocks, but neither pool is left almost empty. No
more pages are made than all rows see at once, and as many again for prompts that begin alike; the rest are blocks.

Example: a window of 1,024 tokens, blocks of 16. A sequence sees 65 blocks at most. If a block takes 1 MiB and a page
5 MiB, one of 4,096 tokens takes 256 + 325 MiB, and 58 of them 33.2 GiB: 14,848 blocks and 3,770 pages. Without pages
it would take 1.5 GiB, and 22 of them fit.
"""

from typing import NamedTuple

from mgpu.protocol.model.attention_facts import Sight, window_blocks
from mgpu.protocol.model.layout import StepLimits

_WINDOWS = 4
"""Length of the sequences that use up both pools at once."""


class PoolSize(NamedTuple):
    """The sizes of a rank's pools of keys and values."""

    num_blocks: int
    num_pages: int = 0
    """Blocks that layers with a window keep; 0: all, in the pool of the others."""


def blocks_of_longest(limits: StepLimits) -> int:
    """Return the blocks of the longest request."""
    return -(-(limits.max_seq_len + 1) // limits.block_size)


def has_pages(sight: Sight, limits: StepLimits) -> bool:
    """Return True if a window leaves blocks behind in the longest request."""
    return sight[0] is not None and blocks_of_longest(limits) > fewest_pages(sight, limits)


def fewest_pages(sight: Sight, limits: StepLimits) -> int:
    """Return the pages with which one sequence can run: those in sight, and one for its next tokens."""
    return window_blocks(sight, limits.block_size) + 1


def pool_size(pool_bytes: int, block_bytes: int, page_bytes: int, sight: Sight, limits: StepLimits) -> PoolSize:
    """Share a pool out; without a block if it is too small. Neither has more than all rows at full length need.

    ``block_bytes``: of one block in layers that see everything; ``page_bytes``: in the others. Layers that a rank does
    not have take no bytes.
    """
    longest = blocks_of_longest(limits)
    most = limits.max_rows * longest
    if not has_pages(sight, limits):
        return PoolSize(_count(pool_bytes, block_bytes + page_bytes, most))
    if not block_bytes or not page_bytes:
        return PoolSize(_count(pool_bytes, block_bytes, most), _count(pool_bytes, page_bytes, most))
    seen = window_blocks(sight, limits.block_size)
    useful = min(most, 2 * limits.max_rows * seen + -(-limits.max_batch_tokens // limits.block_size))
    sequences = pool_bytes // (min(longest, _WINDOWS * seen) * block_bytes + seen * page_bytes)
    pages = max(fewest_pages(sight, limits), min(useful, sequences * seen))
    blocks = _count(pool_bytes - pages * page_bytes, block_bytes, most)
    if blocks == most:
        pages = max(pages, _count(pool_bytes - blocks * block_bytes, page_bytes, useful))
    return PoolSize(blocks, pages)


def _count(pool_bytes: int, each_bytes: int, most: int) -> int:
    """Return how many of a size fit, at most ``most``."""
    return max(0, min(most, pool_bytes // each_bytes) if each_bytes else most * (pool_bytes >= 0))
