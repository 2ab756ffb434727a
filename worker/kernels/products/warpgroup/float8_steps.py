# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What a warpgroup adds to its sums: products of codes with a step's activations, and of offsets with their sums.

The scale of a span multiplies the span's sums, in float32. Sums are read when no product of the same warpgroup is on
its way: else the compiler lets each product wait for the one before. Meanwhile those of the other warpgroup run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from mgpu.worker.kernels.products.warpgroup.codes import halves


@gluon.jit
def load_scales(scale_ptr, rows, span, groups, PER_GROUP: gl.constexpr, EVEN: gl.constexpr):
    """Return the scales of some spans as they are stored, [rows, spans]."""
    group = span // PER_GROUP
    if not EVEN:
        group = gl.minimum(group, groups - 1)
    return gl.load(scale_ptr + gl.expand_dims(rows, 1) * groups + gl.expand_dims(group, 0))


@gluon.jit
def load_biases(
    scale_ptr, zero_ptr, rows, span, first_span, end_span, groups, PER_GROUP: gl.constexpr
):  # fmt: skip
    """Return what multiplies the sums of activations of 64 spans, bfloat16 [rows, 64]; zero for others' spans."""
    group = gl.minimum(span // PER_GROUP, groups - 1)
    places = gl.expand_dims(rows, 1) * groups + gl.expand_dims(group, 0)
    scale = gl.load(scale_ptr + places).to(gl.float32)
    bias = -8.0 * scale
    if zero_ptr is not None:
        bias -= gl.load(zero_ptr + places).to(gl.float32) * scale
    return gl.where(gl.expand_dims((span >= first_span) & (span < end_span), 0), bias, 0.0).to(gl.bfloat16)


@gluon.jit
def _add(acc, sums, factor, SUMS: gl.constexpr):
    factor = gl.convert_layout(factor, gl.SliceLayout(1, SUMS), assert_trivial=True)
    return acc + sums * gl.expand_dims(factor, 1)


@gluon.jit
def add_step(
    acc, even, odd, never, codes, x, factors,
    SPAN: gl.constexpr, ROWS: gl.constexpr, OPERAND: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Add the products of a step. ``never`` is false: the registers of ``even`` and ``odd`` are used again."""
    if SPAN == 128:
        even = warpgroup_mma(codes, x, even, use_acc=never, is_async=True)
        even = warpgroup_mma_wait(0, deps=[even])
        acc = _add(acc, even, gl.reshape(factors, [ROWS]), SUMS)
        acc = warpgroup_mma_wait(0, deps=[acc])
    else:
        codes_0, codes_1 = halves(codes, ROWS, 128, OPERAND)
        factor_0, factor_1 = gl.split(factors)
        even = warpgroup_mma(codes_0, x.slice(0, SPAN, dim=0), even, use_acc=never, is_async=True)
        odd = warpgroup_mma(codes_1, x.slice(SPAN, SPAN, dim=0), odd, use_acc=never, is_async=True)
        even, odd = warpgroup_mma_wait(0, deps=[even, odd])
        acc = _add(_add(acc, even, factor_0, SUMS), odd, factor_1, SUMS)
        acc = warpgroup_mma_wait(0, deps=[acc])  # so that they are added before they are used again
    return acc, even, odd
