"""Kernel tests run in Triton's interpreter on CPU and, marked ``gpu``, compiled on CUDA: the same test bodies."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for kernel_checks.py: importlib mode knows no siblings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any kernel module is imported

triton = pytest.importorskip("triton", reason="triton is not installed")


def _patch_interpreter() -> None:
    """Mend what Triton 3.6's interpreter gets wrong; remove when it does not.

    It keeps bfloat16 as raw uint16 and multiplies the bits; rounding to narrow types loses carries and truncates;
    numpy 2.4 no longer turns its one-element arrays into loop bounds.
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

    original_convert = interpreter._convert_float
    narrow = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}

    def convert(data: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        if from_type.scalar != tl.float32 or to_type.scalar not in narrow:
            return original_convert(data, from_type, to_type, rounding)
        rounded = torch.from_numpy(data.copy()).to(narrow[to_type.scalar])
        return rounded.view(torch.uint16 if rounded.itemsize == 2 else torch.uint8).numpy()

    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch_tensor
    builder.create_dot, builder.cast_impl = dot, cast
    for name in ("create_si_to_fp", "create_ui_to_fp"):
        setattr(builder, name, cast)


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_interpreter()


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """Let the interpreter's arithmetic overflow to infinity in silence, as a GPU's does."""
    import numpy

    with numpy.errstate(all="ignore"):
        yield


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
