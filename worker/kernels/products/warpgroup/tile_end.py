# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""How a program of a warpgroup's product begins beside the kernel before it, and how a tile ends."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def let_next_start():
    """Let the next kernel start; see `runtime.wait_for_inputs`."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_earlier():
    """Wait until all earlier kernels are done and their writes visible."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def block_places(SUMS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WIDTH: gl.constexpr):
    """Return where sums [ROWS, COLUMNS] lie in scratch: blocks of 8 rows and WIDTH columns, as warps have them."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SUMS))
    places = gl.expand_dims(row // 8 * (8 * COLUMNS) + row % 8 * WIDTH, 1)
    return places + gl.expand_dims(column // WIDTH * (8 * WIDTH) + column % WIDTH, 0)


@gluon.jit
def add_splits(out, partial_ptr, counter_ptr, tile, split, offsets, SPLITS: gl.constexpr, SIZE: gl.constexpr):
    """As `quantized_gemm.add_partials`: return (sum over splits, 1) in a tile's last program, else (own sum, 0)."""
    base = partial_ptr + tile * (SPLITS * SIZE)
    gl.store(base + split * SIZE + offsets, out)
    gl.thread_barrier()
    arrived = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    is_last = (arrived == SPLITS - 1).to(gl.int32)
    if is_last:
        out = gl.load(base + offsets, cache_modifier=".cg")
        for other in gl.static_range(1, SPLITS):
            out += gl.load(base + other * SIZE + offsets, cache_modifier=".cg")
        gl.store(counter_ptr + tile, 0)
    return out, is_last


@gluon.jit
def store_tile(
    sums, bias_ptr, y_ptr, first_n, first_m, M, N, y_stride,
    SUMS: gl.constexpr, NUM_WARPS: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """Add the bias to sums [outputs, rows], and store them. WAITS: other warps may still read shared memory."""
    ROWS: gl.constexpr = sums.shape[0]
    COLUMNS: gl.constexpr = sums.shape[1]
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, NUM_WARPS], [0, 1])
    if bias_ptr is not None:
        biased = gl.minimum(first_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS)), N - 1)
        sums += gl.expand_dims(gl.load(bias_ptr + biased).to(gl.float32), 1)
    if WAITS:
        gl.thread_barrier()
    out = gl.convert_layout(sums.to(gl.bfloat16), OUT)
    n = first_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    m = first_m + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, OUT))
    mask = gl.expand_dims(m < M, 0) & gl.expand_dims(n < N, 1)
    gl.store(y_ptr + gl.expand_dims(m.to(gl.int64) * y_stride, 0) + gl.expand_dims(n, 1), out, mask=mask)
