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


CLAMPED = tl.constexpr(3)
"""The constant GATE of `clamped_gate`."""


@triton.jit
def clamped_gate(gate, up, alpha, limit):
    """Return gpt-oss' ``(up + 1) * gate * sigmoid(alpha * gate)``, gate and up clamped before."""
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
