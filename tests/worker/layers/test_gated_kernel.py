"""Which kernel computes gate and up projection of one row."""

from typing import Any

import pytest
import torch

from mgpu.worker.layers import mlp as mlp_module


class Projection:
    """What the choice asks of a layer."""

    def __init__(self, held: Any) -> None:
        self.held, self.bias, self.pieces = held, None, ()

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD

    def takes_float8(self, rows: int) -> bool:
        return False


class Packed:
    def __init__(self, is_simple: bool, order: Any = None) -> None:
        self.is_simple, self.kind, self.group, self.order = is_simple, "fp4", 32, order


@pytest.mark.parametrize(
    ("held", "rows", "kernel"),
    [(torch.ones(2), 1, "one row"), (torch.ones(2), 2, "gated"), (Packed(True), 1, "one row"),
     (Packed(False), 1, "one row"), (Packed(False, "any"), 1, "gated"), (Packed(True), 3, "gated")],
    ids=["dense", "dense, two rows", "simple", "with groups", "with ordered inputs", "simple, three rows"],
)  # fmt: skip
def test_one_row_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch, held: Any, rows: int, kernel: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from mgpu.worker.kernels.layers import activation
    from mgpu.worker.kernels.products import choose

    monkeypatch.setattr(choose, "one_row_matmul", lambda *_: "one row")
    monkeypatch.setattr(activation, "gated_activation", lambda *_: "gated")

    class Layer:
        gate_up, down, activation = Projection(held), Projection(held), "silu"

    assert mlp_module._kernel_activation()(Layer(), torch.ones(rows, 4)) == kernel  # type: ignore[arg-type]
