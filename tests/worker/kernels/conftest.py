"""Kernel tests run in Triton's interpreter on CPU and, marked ``gpu``, compiled on CUDA: the same test bodies."""

from collections.abc import Iterator

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """Let the interpreter's arithmetic overflow to infinity in silence, as a GPU's does."""
    import numpy

    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device that kernels run on: without a GPU the CPU, in the interpreter, else cuda."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    torch.manual_seed(0)
    return torch.device(name)
