"""The check that kernels must pass before a worker uses them: it passes here, and finds what is wrong."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.facts import KvCacheDtype
from mgpu.worker.attention import check as kernel_check
from mgpu.worker.attention import triton_backend as triton_attention
from mgpu.worker.attention.interface import AttentionShape
from mgpu.worker.kernels.attention import latent as latent_kernel
from mgpu.worker.kernels.attention.decode import decode_attention


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Let each test run the check, which remembers its outcome."""
    kernel_check.attention_problem.cache_clear()
    yield
    kernel_check.attention_problem.cache_clear()


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the check compute fewer tokens, which take long in the interpreter."""
    monkeypatch.setattr(kernel_check, "_NEW_TOKENS", (1, 1, 7, 9))
    monkeypatch.setattr(kernel_check, "_CONTEXTS", (1, 150, 7, 20))


def test_kernels_pass_the_whole_check(device: torch.device) -> None:
    shape = AttentionShape(4, 2, 32, torch.float32, (40,), "fp8", has_sinks=True)
    assert kernel_check.attention_problem(device, shape) is None


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("dim", [32, 512])
def test_kernels_pass_the_check(device: torch.device, dim: int) -> None:
    shape = AttentionShape(4, 2, dim, torch.float32, (None,))
    assert kernel_check.attention_problem(device, shape) is None


LATENT = LatentFacts(rank=32, rotated=16, plain=8, value_dim=8)


@pytest.mark.usefixtures("_short")
def test_kernels_of_latents_pass_the_check(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_kernel, "choose_splits", lambda pairs: 2)
    shape = AttentionShape(4, 1, 48, torch.float32, (None,), latent=LATENT)
    assert kernel_check.attention_problem(device, shape) is None
    monkeypatch.setattr(triton_attention, "latent_attention", lambda *args, **options: None)
    problem = kernel_check.attention_problem(device, replace(shape, num_q=2))
    assert problem is not None
    assert "off by" in problem


@pytest.mark.parametrize(
    ("changes", "kept", "words"),
    [({"rank": 48}, "auto", "not 48 and 16"), ({"rotated": 8}, "auto", "not 32 and 8"), ({}, "fp8", "no float8 cache")],
)
def test_latents_that_kernels_cannot_have_are_named(
    device: torch.device, changes: dict[str, int], kept: KvCacheDtype, words: str
) -> None:
    latent = replace(LATENT, **changes)
    shape = AttentionShape(4, 1, latent.width, torch.float32, (None,), kept, latent=latent)
    assert words in (kernel_check.attention_problem(device, shape) or "")


@pytest.mark.parametrize(("dim", "kept"), [(96, "auto"), (16, "fp8")])
def test_a_head_size_that_kernels_cannot_have_is_named(device: torch.device, dim: int, kept: KvCacheDtype) -> None:
    problem = kernel_check.attention_problem(device, AttentionShape(4, 2, dim, torch.float32, (None,), kept))
    assert problem is not None
    assert f"not {dim}" in problem


@pytest.mark.usefixtures("_short")
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


@pytest.mark.usefixtures("_short")
def test_a_kernel_that_fails_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(triton_attention, "prefill_attention", fail)
    problem = kernel_check.attention_problem(device, AttentionShape(2, 2, 16, torch.float32, (None,)))
    assert problem is not None
    assert "no such instruction" in problem
