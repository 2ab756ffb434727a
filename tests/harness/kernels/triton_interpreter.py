"""Mend Triton's interpreter before kernels run in it."""

from typing import Any

import torch


def mend_interpreter() -> None:
    """Mend what Triton 3.6's interpreter gets wrong; remove when it does not.

    It keeps bfloat16 as raw uint16 and multiplies the bits; rounding to narrow types loses carries and truncates;
    numpy 2.4 no longer turns its one-element arrays into loop bounds.
    """
    import triton.language as tl
    from triton.runtime import interpreter

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
