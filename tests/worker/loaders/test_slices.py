import os
from pathlib import Path

import pytest
import torch

from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.worker.loaders import slices
from mgpu.worker.loaders.block_formats import block_type
from mgpu.worker.loaders.slices import FileRows


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 16))
    return path


def _read(path: Path, rows: int, row_bytes: int, stride: int, offset: int = 0) -> bytes:
    entry = TensorEntry("weight", "F16", (rows, row_bytes // 2), str(path), offset, rows * row_bytes)
    buffer = torch.zeros(rows * row_bytes, dtype=torch.uint8)
    with path.open("rb") as file:
        FileRows(entry, block_type("F16"), file.fileno(), offset, rows, row_bytes, stride).read(buffer.numpy().data)
    return bytes(buffer.numpy().data)


@pytest.mark.parametrize(("row_bytes", "stride"), [(8, 8), (2, 4), (90, 180), (100, 1024), (4, 1024)])
def test_rows_with_gaps_are_those_of_the_file(
    stored: Path, row_bytes: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "READ_AT_ONCE", 10 * stride)
    content = stored.read_bytes()
    rows = (len(content) - row_bytes) // stride + 1  # the last gap may lie behind the end of the file
    offset = len(content) - (rows - 1) * stride - row_bytes

    wanted = b"".join(content[at : at + row_bytes] for at in range(offset, len(content), stride))
    assert _read(stored, rows, row_bytes, stride, offset) == wanted


def test_many_short_rows_take_one_call_of_the_kernel(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(sum(map(len, buffers)) * len(buffers))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    _read(stored, rows=1 << 14, row_bytes=2, stride=4)
    assert calls == [(1 << 16) - 2]


def test_rows_behind_the_end_of_the_file_are_refused(stored: Path) -> None:
    with pytest.raises(CheckpointError, match="the file is truncated"):
        _read(stored, rows=(1 << 14) + 1, row_bytes=2, stride=4)
