"""Packed matrices of one shape in one stack, as the experts of a layer are: each tensor gets a first dimension."""

from mgpu.worker.quantization.packing import PackedWeight


def empty_stack(like: PackedWeight, count: int) -> PackedWeight:
    """Return undefined memory for ``count`` matrices packed as ``like`` is."""
    return like.changed(lambda tensor: tensor.new_empty((count, *tensor.shape)))


def put_matrix(stack: PackedWeight, index: int, matrix: PackedWeight) -> None:
    """Copy one matrix into its place."""
    for whole, part in zip(stack.tensors(), matrix.tensors(), strict=True):
        whole[index] = part


def matrix_of(stack: PackedWeight, index: int) -> PackedWeight:
    """Return one matrix of a stack, without copying it."""
    return stack.changed(lambda tensor: tensor[index])
