"""Packed matrices of one shape in one stack, as the experts of a layer are: words and scales get a first dimension."""

from dataclasses import replace

from mgpu.worker.quantization.packing import PackedWeight


def empty_stack(like: PackedWeight, count: int) -> PackedWeight:
    """Return undefined memory for ``count`` matrices packed as ``like`` is."""
    return replace(
        like,
        words=like.words.new_empty((count, *like.words.shape)),
        scales=like.scales.new_empty((count, *like.scales.shape)),
    )


def put_matrix(stack: PackedWeight, index: int, matrix: PackedWeight) -> None:
    """Copy one matrix into its place."""
    stack.words[index] = matrix.words
    stack.scales[index] = matrix.scales


def matrix_of(stack: PackedWeight, index: int) -> PackedWeight:
    """Return one matrix of a stack, without copying it."""
    return replace(stack, words=stack.words[index], scales=stack.scales[index])
