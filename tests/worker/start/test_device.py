"""CUDA is started early on a GPU; a failure is left for torch to explain."""

import ctypes

import pytest

from mgpu.worker.start import device
from mgpu.worker.start.device import cuda_ordinal, start_cuda


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")


class FakeDriver:
    """Records the calls; one of them may fail."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self._failing = failing

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> int:
            self.calls.append(name)
            return 100 if name == self._failing else 0

        call.__name__ = name
        return call


def test_devices_are_numbered_by_name_or_by_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (cuda_ordinal("cuda"), cuda_ordinal("cuda:1")) == (3, 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert cuda_ordinal("cuda") == 0


@pytest.mark.parametrize(("failing", "calls"), [("", 3), ("cuInit", 1), ("cuDeviceGet", 2)])
def test_a_context_is_made_as_far_as_the_driver_goes(monkeypatch: pytest.MonkeyPatch, failing: str, calls: int) -> None:
    driver = FakeDriver(failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    thread = start_cuda("cuda:0")
    assert thread is not None
    thread.join(10)
    assert driver.calls == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"][:calls]


def test_nothing_is_started_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_DRIVER", "libdoes-not-exist.so")
    assert start_cuda("cpu") is None
    thread = start_cuda("cuda")
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
