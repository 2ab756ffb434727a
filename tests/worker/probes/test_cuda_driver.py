"""The driver's calls without torch, with an imitated library; and probes on machines without a driver."""

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import pytest

from mgpu.worker.probes import cuda_driver, pairs, speed
from mgpu.worker.probes.cuda_driver import Driver, DriverError


def imitate(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    def error_name(code: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_IMITATED" if code == 7 else None
        return 0

    library = SimpleNamespace(cuInit=lambda _: 0, cuGetErrorName=error_name, **functions)
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda _: library)


def test_a_value_is_what_the_driver_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(found: Any) -> int:
        found._obj.value = 3
        return 0

    imitate(monkeypatch, cuDeviceGetCount=count)
    assert Driver().value("cuDeviceGetCount", ctypes.c_int).value == 3


@pytest.mark.parametrize(("code", "text"), [(7, r"CUDA_ERROR_IMITATED \(7\)"), (8, r"\(8\)")])
def test_a_refusal_names_the_call_and_the_error(monkeypatch: pytest.MonkeyPatch, code: int, text: str) -> None:
    imitate(monkeypatch, cuCtxSynchronize=lambda: code)
    with pytest.raises(DriverError, match=f"cuCtxSynchronize: .*{text}"):
        Driver().call("cuCtxSynchronize")


def test_probes_say_that_there_is_no_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libnowhere.so.1")
    pairs.run([(0, 1)])
    assert "libnowhere" in json.loads(capsys.readouterr().out)["error"]
    assert speed.main() == 1
    assert "libnowhere" in capsys.readouterr().err


def test_speeds_are_those_of_the_gpus_that_could_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = []

    def stores(number: int) -> Any:
        def call(found: Any, *_: object) -> int:
            found._obj.value = number
            return 0

        return call

    def device(found: Any, ordinal: int) -> int:
        found._obj.value = ordinal
        return 7 if ordinal == 1 else 0

    monkeypatch.setattr(speed, "_BURSTS", 2)
    monkeypatch.setattr(speed, "_PAUSE_S", 0)
    imitate(
        monkeypatch,
        cuDeviceGetCount=stores(2),
        cuDeviceGet=device,
        cuDevicePrimaryCtxRetain=stores(11),
        cuDevicePrimaryCtxRelease_v2=lambda _: 0,
        cuCtxSetCurrent=lambda _: 0,
        cuStreamCreate=stores(12),
        cuStreamSynchronize=lambda _: 0,
        cuMemAlloc_v2=stores(4096),
        cuMemcpyDtoDAsync_v2=lambda to, source, size, stream: copied.append(size.value) or 0,
    )
    assert speed.main() == 0
    out, err = capsys.readouterr()
    assert (*json.loads(out),) == ("0",)
    assert json.loads(out)["0"] > 0
    assert "GPU 1: cuDeviceGet: CUDA_ERROR_IMITATED" in err
    assert sum(copied) * 2 == speed._BURST_BYTES * (2 + speed._WARM)
