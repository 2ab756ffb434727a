"""Packed matrices are read by several threads at once; they arrive in order and are counted in the caller's thread."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.models.stored_models import STORED
from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.worker.loaders import packed, reader
from mgpu.worker.loaders.background import MOST_THREADS, Background
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.quantization.packing import PackedWeight

CPU = torch.device("cpu")
DEADLINE_S = 30


@pytest.fixture
def background() -> Iterator[Background]:
    threads = Background(CPU, 64)
    yield threads
    threads.close()


def test_results_come_in_order_while_later_calls_run(background: Background) -> None:
    later = threading.Event()

    def first() -> str:
        assert later.wait(DEADLINE_S)
        return "first"

    def second() -> str:
        later.set()
        return "second"

    assert list(background.in_order([first, second])) == ["first", "second"]


def test_few_calls_run_ahead_of_what_is_taken(background: Background) -> None:
    begun: list[int] = []
    results = background.in_order(lambda at=at: begun.append(at) or at for at in range(100))
    assert next(results) == 0
    assert len(begun) <= MOST_THREADS + 2
    assert list(results) == [*range(1, 100)]


def test_an_error_reaches_the_caller(background: Background) -> None:
    def fail() -> None:
        raise CheckpointError("the file ends")

    with pytest.raises(CheckpointError, match="the file ends"):
        list(background.in_order([fail, lambda: None]))


@pytest.mark.parametrize("name", ["mxfp4 experts", "GGUF Q4_K", "gptq"])
def test_threads_read_what_one_thread_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    name = next(each for each in STORED if each.lower().startswith(name.lower()))
    model = STORED[name](tmp_path)
    checkpoint = model.packed
    names = [each for each, entry in checkpoint.tensors.items() if entry.packed is not None][:4]
    counted: list[tuple[int, threading.Thread]] = []

    def read() -> list[PackedWeight]:
        with WeightReader(checkpoint, lambda count: counted.append((count, threading.current_thread()))) as source:
            rows = [range(checkpoint.tensors[each].shape[0]) for each in names]
            calls = [
                lambda each=each, all=all: source.packed_rows([(each, all)])
                for each, all in zip(names, rows, strict=True)
            ]
            return [*source.in_background(calls), *(call() for call in calls)]

    expected, bytes_read = read(), sum(count for count, _ in counted)
    counted.clear()
    monkeypatch.setattr(reader, "Background", lambda device, threads: Background(device, 4))
    monkeypatch.setitem(packed.CHUNK_ELEMENTS, "cpu", 256)
    found = read()
    assert [count for count, thread in counted if thread is not threading.current_thread()] == []
    assert sum(count for count, _ in counted) >= bytes_read
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))
