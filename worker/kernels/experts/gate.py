# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Gated activations of experts, in registers."""

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, GATE: tl.constexpr):
    """Return act(gate) * up of float32 tiles: 1 is silu, 2 is gelu_tanh."""
    if GATE == 2:
        # tanh(z) = 2 * sigmoid(2z) - 1, so gelu_tanh(x) = x * sigmoid(2z)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-2.0 * z))
    else:
        active = gate / (1.0 + tl.exp(-gate))
    return active * up
