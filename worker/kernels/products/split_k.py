# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products whose K is split over programs: how they are cut, and the sum of their parts.

The last program of a tile to finish adds the partial sums in split order, so that the result does not depend on which
one that was.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from mgpu.worker.kernels.runtime import power_of_2


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product of few rows is cut."""

    block_n: int
    splits: int
    num_warps: int = 4
    num_stages: int = 5
    most_rows: int = 64
    """Rows of a tile at most, a power of two. Tiles of other rows read the same weights again, from the L2 cache."""

    def block_m(self, rows: int) -> int:
        """Rows of the padded tile."""
        return min(self.most_rows, max(16, power_of_2(rows)))


@triton.jit
def add_partials(acc, partial_ptr, counter_ptr, tile, split, offsets, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """Publish this program's sums; return (sum over splits, 1) in the last program of the tile, else (own sum, 0)."""
    base = partial_ptr + tile * (SPLITS * SIZE)
    tl.store(base + split * SIZE + offsets, acc)
    tl.debug_barrier()  # all threads' stores precede the release below
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    is_last = arrived == SPLITS - 1
    if is_last:
        acc = tl.load(base + offsets, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(base + other * SIZE + offsets, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    return acc, is_last
