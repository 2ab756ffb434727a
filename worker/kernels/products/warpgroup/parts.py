# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""How programs share the steps of all tiles of a product: as many each, wherever one tile ends and the next begins.

Tiles with the same outputs and other rows are far from each other, so that programs work on them at the same time, and
read a weight from memory once. A tile that several programs have steps of is added up by the last of them.
"""

from math import ceil

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mgpu.worker.kernels.products.warpgroup.tile_end import block_places
from mgpu.worker.kernels.runtime import HOPPER_SMS


@gluon.jit
def share(program, tiles, steps):
    """Return the first step of a program, of all steps of all tiles one after the other."""
    return (program * (tiles * steps)) // gl.num_programs(0)


@gluon.jit
def _program_of(step, tiles, steps):
    """Return the program that has a step."""
    return ((step + 1) * gl.num_programs(0) - 1) // (tiles * steps)


@gluon.jit
def place(tile, first, end, columns, steps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return a tile's first output and row, and which of its steps a program with steps from ``first`` on has."""
    begin = gl.maximum(first - tile * steps, 0)
    count = gl.minimum(end - tile * steps, steps) - begin
    return tile % columns * BLOCK_N, tile // columns * BLOCK_M, begin, count


@gluon.jit
def add_parts(
    acc, partial_ptr, counter_ptr, tile, first_tile, tiles, steps,
    HALF: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Return (sum over the programs that have steps of a tile, 1) in the last one that is done, else (own sum, 0)."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    offsets = block_places(SUMS, ROWS, COLUMNS, 8)
    own = gl.program_id(0) * 2 + (tile > first_tile).to(gl.int32)
    gl.store(partial_ptr + (own * 2 + HALF) * (ROWS * COLUMNS) + offsets, acc)
    gl.thread_barrier()
    begin = _program_of(tile * steps, tiles, steps)
    last = _program_of((tile + 1) * steps - 1, tiles, steps)
    arrived = gl.atomic_add(counter_ptr + tile * 2 + HALF, 1, sem="acq_rel")
    is_last = (arrived == last - begin).to(gl.int32)
    if is_last:
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, SUMS)
        for program in range(begin, last + 1):  # always in the same order
            part = program * 2 + (tile > share(program, tiles, steps) // steps).to(gl.int32)
            acc += gl.load(partial_ptr + (part * 2 + HALF) * (ROWS * COLUMNS) + offsets, cache_modifier=".cg")
        gl.store(counter_ptr + tile * 2 + HALF, 0)
    return acc, is_last


def fewest_steps(tiles: int, steps: int, end: float) -> int:
    """Return the number of programs with which the last one is done first.

    The end of a tile, or of a program's part of it, takes as long as ``end`` steps. So where it leaves about as few
    steps to each program, a tile has a whole number of programs, or a program a whole number of tiles.
    """

    def cost(programs: int) -> float:
        each = tiles * steps / programs
        if tiles % programs == 0:
            return each + end * tiles / programs
        return ceil(each) + end * (1.5 if programs % tiles == 0 else each / steps + 2)

    return min(range(1, min(HOPPER_SMS, tiles * steps) + 1), key=cost)
