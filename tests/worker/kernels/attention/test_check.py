"""The check that kernels must pass before a worker uses them: it passes here, and finds what is wrong."""

from typing import Any

import pytest
import torch

from mgpu.protocol.model.facts import KvCacheDtype
from mgpu.worker.attention import check as kernel_check
from mgpu.worker.attention import triton_backend as triton_attention
from mgpu.worker.attention.interface import AttentionShape
from mgpu.worker.kernels.attention.decode import decode_attention


@pytest.mark.parametrize(("window", "kept"), [(None, "auto"), (40, "fp8")])
def test_kernels_pass_the_check(device: torch.device, window: int | None, kept: KvCacheDtype) -> None:
    shape = AttentionShape(4, 2, 32, torch.float32, (window,), kept)
    assert kernel_check.attention_problem(device, shape) is None


@pytest.mark.parametrize(("dim", "kept"), [(96, "auto"), (16, "fp8")])
def test_a_head_size_that_kernels_cannot_have_is_named(device: torch.device, dim: int, kept: KvCacheDtype) -> None:
    problem = kernel_check.attention_problem(device, AttentionShape(4, 2, dim, torch.float32, (None,), kept))
    assert problem is not None
    assert f"not {dim}" in problem


@pytest.mark.parametrize("result", [1.0, torch.nan])
def test_a_kernel_that_computes_something_else_is_found(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, result: float
) -> None:
    def wrong(*args: Any, out_RHK: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        return decode_attention(*args, **options) if out_RHK is None else out_RHK.fill_(result)

    monkeypatch.setattr(triton_attention, "decode_attention", wrong)
    problem = kernel_check.attention_problem(device, AttentionShape(2, 1, 16, torch.float32, (None,)))
    assert problem is not None
    assert "off by" in problem


def test_a_kernel_that_fails_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(triton_attention, "prefill_attention", fail)
    problem = kernel_check.attention_problem(device, AttentionShape(2, 2, 16, torch.float32, (None,)))
    assert problem is not None
    assert "no such instruction" in problem
