"""Reads through buffers that are used again."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.worker.loaders.block_formats import BlockType
from mgpu.worker.loaders.pinned_reads import PinnedReads
from mgpu.worker.loaders.slices import FileRows

_SIZE = 9 << 20
"""More than a buffer has at first."""


def source(fd: int, name: str, first: int, count: int) -> FileRows:
    plain = BlockType(1, 1, lambda raw: raw, torch.uint8)
    return FileRows(TensorEntry(name, "U8", (count,), name, 0, count), plain, fd, first, 1, count, count)


_NEEDS_GPU = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=_NEEDS_GPU)])
def test_what_was_read_stays_when_its_buffer_is_used_again(tmp_path: Path, kind: str) -> None:
    right = torch.arange(_SIZE, dtype=torch.int32).to(torch.uint8)
    (tmp_path / "bytes").write_bytes(right.numpy().tobytes())
    fd = os.open(tmp_path / "bytes", os.O_RDONLY)
    try:
        reads = PinnedReads(torch.device(kind))
        places = [(0, 5), (7, 1 << 20), (3, _SIZE - 3), (100, 200), (1, _SIZE - 1), (2, 3)]
        found: list[Tensor] = [reads.read(source(fd, "bytes", *place)) for place in places]
        for (first, count), each in zip(places, found, strict=True):
            assert torch.equal(each.cpu(), right[first : first + count])
        with pytest.raises(CheckpointError, match="the file is truncated"):
            reads.read(source(fd, "bytes", 10, _SIZE))
    finally:
        os.close(fd)
