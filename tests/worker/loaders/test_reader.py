"""Any slice of any stored type equals the slice of the whole tensor, and what is broken is named."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from harness.specs import make_facts
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, TensorEntry
from mgpu.protocol.model.facts import ModelFacts, ModelSource
from mgpu.worker.loaders import copiers
from mgpu.worker.loaders import reader as reader_module
from mgpu.worker.loaders.reader import WeightReader

ROWS, COLUMNS = 12, 512
BUFFER_BYTES = 16 << 10
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# Where a block of a K type has its float16 scales: random bytes there would be infinities.
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.fixture(autouse=True, params=["calling-thread", "threads"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read as for tensors of the CPU, or with the threads that are used for a GPU."""
    monkeypatch.setattr(copiers, "STAGING_BYTES", BUFFER_BYTES)
    if request.param == "threads":
        make = lambda device, threads, progress: copiers.ThreadedCopier(device, 3, progress)  # noqa: E731
        monkeypatch.setattr(reader_module, "make_copier", make)
    return str(request.param)


def facts(architecture: str = "qwen2") -> ModelFacts:
    return make_facts(
        q=2, kv=2, layers=1, hidden=COLUMNS, width=64, head_dim=6, vocab=ROWS, context=64, architecture=architecture
    )


def stored_matrix(dtype: str) -> tuple[bytes, Tensor]:
    """Make a random [ROWS, COLUMNS] matrix of a type: its bytes, and its values as the whole tensor decodes."""
    generator = np.random.default_rng(5)
    values = generator.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    if dtype in PLAIN:
        tensor = torch.from_numpy(values).to(PLAIN[dtype])
        return tensor.view(torch.uint8).numpy().tobytes(), tensor.float()
    kind = GGMLQuantizationType[dtype]
    if dtype in SCALES:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        raw = generator.integers(0, 256, (ROWS * COLUMNS // elements, size), dtype=np.uint8)
        for place in SCALES[dtype]:
            scales = generator.uniform(0.01, 0.1, len(raw)).astype(np.float16)
            raw[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
        raw = raw.reshape(ROWS, -1)
    else:
        raw = gguf.quants.quantize(values, kind)
    return raw.tobytes(), torch.from_numpy(gguf.quants.dequantize(raw, kind))


def write_tensor(
    folder: Path, data: bytes, dtype: str, shape: tuple[int, ...] = (ROWS, COLUMNS), name: str = "t"
) -> Checkpoint:
    """Put one tensor at an odd offset of a file."""
    path = folder / "weights"
    path.write_bytes(b"\xff" * 13 + data + b"\xff" * 100)
    entry = TensorEntry(name, dtype, shape, str(path), 13, len(data))
    return Checkpoint(ModelSource(str(path), "gguf"), facts(), {name: entry})


def reader_of(checkpoint: Checkpoint) -> WeightReader:
    return WeightReader(checkpoint, lambda count: None)


@pytest.mark.parametrize("dtype", [*PLAIN, *QUANTIZED])
def test_slices_of_every_type_equal_the_whole_tensor(tmp_path: Path, dtype: str) -> None:
    data, whole = stored_matrix(dtype)
    with reader_of(write_tensor(tmp_path, data, dtype)) as reader:
        for first, end in [(0, ROWS), (0, 5), (5, 12), (7, 8)]:
            rows = torch.empty(end - first, COLUMNS)
            reader.fill_rows(rows, "t", first)
            reader.wait()
            assert torch.equal(rows, whole[first:end])
        for first, end in [(0, COLUMNS), (0, 256), (170, 341), (341, 512), (33, 34), (510, 512)]:
            columns = torch.empty(ROWS, end - first)
            reader.fill_columns(columns, "t", first)
            reader.wait()
            assert torch.equal(columns, whole[:, first:end])


@pytest.mark.parametrize("dtype", ["BF16", "Q4_1", "Q6_K"])
def test_small_chunks_give_the_same_values(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, whole = stored_matrix(dtype)
    monkeypatch.setattr(copiers, "DIRECT_BYTES", 700)
    monkeypatch.setattr(copiers, "STAGING_BYTES", 700)
    with reader_of(write_tensor(tmp_path, data, dtype)) as reader:
        rows, columns = torch.empty(ROWS, COLUMNS), torch.empty(ROWS, 100)
        reader.fill_rows(rows, "t")
        reader.fill_columns(columns, "t", 201)
    assert torch.equal(rows, whole)
    assert torch.equal(columns, whole[:, 201:301])


def test_slices_of_a_vector_and_conversion_to_another_dtype(tmp_path: Path) -> None:
    whole = torch.randn(COLUMNS)
    data = whole.numpy().tobytes()
    with reader_of(write_tensor(tmp_path, data, "F32", (COLUMNS,))) as reader:
        part = torch.empty(100, dtype=torch.bfloat16)
        reader.fill_rows(part, "t", 17)
    assert torch.equal(part, whole[17:117].bfloat16())


def test_only_covering_blocks_are_read_and_reported(tmp_path: Path) -> None:
    data, _ = stored_matrix("Q4_1")
    reported: list[int] = []
    with WeightReader(write_tensor(tmp_path, data, "Q4_1"), reported.append) as reader:
        reader.fill_columns(torch.empty(ROWS, 40), "t", 60)  # elements 60 to 100 lie in blocks 1, 2 and 3
        reader.wait()
        assert reader.bytes_read == sum(reported) == ROWS * 3 * 20
        reader.fill_rows(torch.empty(2, COLUMNS), "t", 3)
        reader.wait()
        assert reader.bytes_read == sum(reported) == (ROWS * 3 + 2 * COLUMNS // 32) * 20


@pytest.mark.parametrize("name", ["x.q_proj.weight", "x.k_proj.weight", "x.q_proj.bias"])
def test_rotary_halves_of_llama_gguf_are_separated_per_head(tmp_path: Path, name: str) -> None:
    width = () if name.endswith("bias") else (COLUMNS,)
    rows = torch.randn(ROWS, *width)
    # The order that llama.cpp's converter writes: per head of 6, row i and row i + 3 become neighbours.
    stored = rows.view(2, 2, 3, *width).transpose(1, 2).reshape(rows.shape).contiguous()
    made = write_tensor(tmp_path, stored.numpy().tobytes(), "F32", (ROWS, *width), name)
    with reader_of(Checkpoint(made.source, facts("llama"), made.tensors)) as reader:
        second_head = torch.empty(6, *width)
        reader.fill_rows(second_head, name, 6)
    assert torch.equal(second_head, rows[6:])


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, dtype: str) -> None:
    data = bytearray(stored_matrix(dtype)[0])
    data[0:2] = b"\xff\xff"  # a NaN scale; for F32 see the next line
    data[2:4] = b"\xff\xff" if dtype == "F32" else data[2:4]
    with (
        pytest.raises(CheckpointError, match=r"tensor 't' in .*weights holds NaN or infinity"),
        reader_of(write_tensor(tmp_path, bytes(data), dtype)) as reader,
    ):
        reader.fill_rows(torch.empty(ROWS, COLUMNS), "t")


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path: Path) -> None:
    data = torch.full((ROWS, COLUMNS), 1e6).numpy().tobytes()
    with (
        pytest.raises(CheckpointError, match=r"does not fit torch\.float16; use bfloat16 or float32"),
        reader_of(write_tensor(tmp_path, data, "F32")) as reader,
    ):
        reader.fill_rows(torch.empty(ROWS, COLUMNS, dtype=torch.float16), "t")


def test_a_file_that_shrank_is_refused(tmp_path: Path) -> None:
    data, _ = stored_matrix("F16")
    checkpoint = write_tensor(tmp_path, data, "F16")
    with open(tmp_path / "weights", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="ends inside tensor 't'"), reader_of(checkpoint) as reader:
        reader.fill_rows(torch.empty(ROWS, COLUMNS), "t")


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    checkpoint = write_tensor(tmp_path, stored_matrix("F16")[0], "F16")
    (tmp_path / "weights").unlink()
    with reader_of(checkpoint) as reader, pytest.raises(CheckpointError, match=r"cannot open .*weights.*No such file"):
        reader.fill_columns(torch.empty(ROWS, 5), "t")


def test_absent_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    with reader_of(write_tensor(tmp_path, stored_matrix("F16")[0], "F16")) as reader:
        with pytest.raises(CheckpointError, match="'other' is missing"):
            reader.fill_rows(torch.empty(ROWS, COLUMNS), "other")
        with pytest.raises(CheckpointError, match=r"shape \[12, 512\]; rows 8 to 13"):
            reader.fill_rows(torch.empty(5, COLUMNS), "t", 8)
        with pytest.raises(CheckpointError, match=r"shape \[12, 512\]; columns 500 to 520"):
            reader.fill_columns(torch.empty(ROWS, 20), "t", 500)


def test_a_missing_gguf_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with (
        pytest.raises(CheckpointError, match="pip install gguf"),
        reader_of(write_tensor(tmp_path, stored_matrix("Q4_0")[0], "Q4_0")) as reader,
    ):
        reader.fill_rows(torch.empty(ROWS, COLUMNS), "t")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["BF16", "F32", "Q4_1"])
def test_a_gpu_gets_what_the_cpu_gets_and_names_what_is_not_finite(tmp_path: Path, dtype: str) -> None:
    data, whole = stored_matrix(dtype)
    device = torch.device("cuda:0")
    checkpoint = write_tensor(tmp_path, data, dtype)
    with WeightReader(checkpoint, lambda count: None, device, 4) as reader:
        for _ in range(50):  # each time into memory that the last one may still be copied to
            rows = torch.empty(7, COLUMNS, dtype=torch.bfloat16, device=device)
            columns = torch.empty(ROWS, 171, dtype=torch.bfloat16, device=device)
            reader.fill_rows(rows, "t", 5)
            reader.fill_columns(columns, "t", 170)
            reader.wait()
            assert torch.equal(rows.cpu(), whole[5:].bfloat16())
            assert torch.equal(columns.cpu(), whole[:, 170:341].bfloat16())
    broken = write_tensor(tmp_path, b"\xff" * len(data), dtype)
    with (
        pytest.raises(CheckpointError, match=r"tensor 't' in .*weights holds NaN or infinity"),
        WeightReader(broken, lambda count: None, device, 4) as reader,
    ):
        reader.fill_rows(torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=device), "t")
