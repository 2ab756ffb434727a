"""Tests of products by warpgroups, which only Hopper has."""

from types import ModuleType

import pytest
import torch

from mgpu.worker.kernels import runtime
from mgpu.worker.kernels.runtime import LAUNCH_MODE


def hopper() -> torch.device:
    """Return the GPU; skip the test if it is another one, or none."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU, which is the one that has warpgroups")
    return torch.device("cuda")


def check_trial(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, product: str, other_capability: tuple[int, int]
) -> None:
    """Check that a function of a module returns a product for Hopper, none after a bad trial, and none elsewhere."""
    device, find = torch.device("cuda:7"), getattr(module, product)
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "trial_error", lambda *_: torch.inf)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", True)
    assert find(device) is not None
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", False)
    assert find(device) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: other_capability)
    assert find(torch.device("cuda:6")) is None
