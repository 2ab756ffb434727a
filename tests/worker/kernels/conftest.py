"""Kernel tests run in Triton's interpreter on CPU and, marked ``gpu``, compiled on CUDA: the same test bodies."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any kernel module is imported

triton = pytest.importorskip("triton", reason="triton is not installed")


def _patch_interpreter() -> None:
    """Mend what Triton 3.6's interpreter gets wrong: it keeps bfloat16 as raw uint16 and computes on the bits.

    Loop bounds: numpy 2.4 no longer turns one-element arrays into integers. Remove when Triton's own does all three.
    """
    from triton.runtime import interpreter

    tl = triton.language
    builder = interpreter.InterpreterBuilder
    original_patch = interpreter._patch_lang_tensor
    original_dot, original_cast = builder.create_dot, builder.cast_impl

    def patch_tensor(tensor: object, scope: Any) -> None:
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def to_float(self: Any, handle: Any) -> Any:
        return original_cast(self, handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original_dot(self, to_float(self, a), to_float(self, b), *rest)

    def cast(self: Any, source: Any, to_type: Any) -> Any:
        if to_type.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = original_cast(self, source, tl.float32)
        return original_cast(self, source, to_type)

    interpreter._patch_lang_tensor = patch_tensor
    builder.create_dot, builder.cast_impl = dot, cast
    for name in ("create_si_to_fp", "create_ui_to_fp"):
        setattr(builder, name, cast)


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_interpreter()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Give the device a kernel runs on: cpu in the interpreter where there is no GPU, else cuda."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    torch.manual_seed(0)
    return torch.device(name)
