"""What the server tells about the memory of its GPUs."""

import threading

from harness.machines import GIB, FakeGpu, FakeMemory, FakeNvml
from harness.waiting import eventually
from mgpu.orchestrator.engine.gpu_memory import GpuMemory

GPUS = [FakeGpu("GPU-a", "0", memory=FakeMemory(80 * GIB, 20 * GIB)), FakeGpu("GPU-b", "1"), FakeGpu("GPU-c", "2")]


def test_the_gpus_in_use_are_told_by_their_ordinals() -> None:
    memory = GpuMemory({1: "GPU-a", 0: "GPU-c"}, FakeNvml(GPUS))
    eventually(lambda: memory.counters() == {
        "gpu1_memory_used_bytes": 60 * GIB, "gpu1_memory_total_bytes": 80 * GIB,
        "gpu0_memory_used_bytes": 1 * GIB, "gpu0_memory_total_bytes": 80 * GIB,
    })  # fmt: skip


def test_a_driver_that_hangs_or_fails_is_not_waited_for() -> None:
    asked, goes_on = threading.Event(), threading.Event()

    class Hanging(FakeNvml):
        def nvmlInit(self) -> None:
            asked.set()
            assert goes_on.wait(20)
            raise self.NVMLError("gone")

    memory = GpuMemory({0: "GPU-a"}, Hanging(GPUS))
    try:
        assert [memory.counters() for _ in range(3)] == [{}, {}, {}]
        assert asked.wait(20)
        assert sum(thread.name == "gpu-memory" for thread in threading.enumerate()) == 1
    finally:
        goes_on.set()


def test_a_lost_gpu_has_no_reading_and_readings_are_made_again() -> None:
    driver = FakeNvml([FakeGpu("GPU-a", "0"), FakeGpu("GPU-b", "1", lost=True)])
    memory = GpuMemory({0: "GPU-a", 1: "GPU-b"}, driver)
    eventually(lambda: set(memory.counters()) == {"gpu0_memory_used_bytes", "gpu0_memory_total_bytes"})
    driver.devices[0].memory = FakeMemory(80 * GIB, 0)
    eventually(lambda: memory.counters()["gpu0_memory_used_bytes"] == 80 * GIB)


def test_without_gpus_nothing_is_asked() -> None:
    memory = GpuMemory({}, FakeNvml(GPUS))
    assert memory.counters() == {}
    assert "gpu-memory" not in {thread.name for thread in threading.enumerate()}
