"""Kernels that multiply by sigmoids against torch."""

import pytest
import torch

from harness.kernels.kernel_checks import relative_error, tolerance
from mgpu.worker.kernels.layers.gates import add_share, gate_heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_scale", [False, True])
def test_heads_are_multiplied_by_their_gates(device: torch.device, dtype: torch.dtype, has_scale: bool) -> None:
    heads, packed = torch.randn(3, 96, device=device).to(dtype), torch.randn(3, 200, device=device).to(dtype)
    scale = torch.rand(3, device=device) if has_scale else None
    gates = packed[:, 104:].float()
    expected = heads.float() * torch.sigmoid(gates if scale is None else gates * scale.unsqueeze(1))
    assert relative_error(gate_heads(heads, packed[:, 104:], scale), expected) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_network_is_added_by_each_tokens_share(device: torch.device, dtype: torch.dtype) -> None:
    y, shared, x = (torch.randn(3, 96, device=device).to(dtype) for _ in range(3))
    weight = torch.randn(1, 96, device=device).mul_(0.1).to(dtype)
    expected = y.float() + shared.float() * torch.sigmoid(x.float() @ weight.float().T)
    assert relative_error(add_share(y, shared, x, weight), expected) < tolerance(dtype)
