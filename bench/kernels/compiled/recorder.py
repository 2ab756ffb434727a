"""Launches of kernels are noted instead of made, each kind once, and compiled afterwards, side by side."""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_USED = re.compile(r"REG:(\d+) STACK:(\d+)")
_compile = JITFunction.run


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, and what it is compiled for."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    by: str
    """What launched it first."""

    @property
    def file(self) -> str:
        return str(self.kernel.fn.__module__).removeprefix("mgpu.worker.kernels.")

    @property
    def constants(self) -> dict[str, Any]:
        pairs = zip(self.kernel.params, self.arguments, strict=False)
        return {param.name: value for param, value in pairs if param.is_constexpr and isinstance(value, (int, str))}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel takes. ``stack_bytes`` are of registers that were spilled, and of arrays."""

    shared_bytes: int = 0
    registers: int = 0
    stack_bytes: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class _StandIn:
    """Has of a tensor what a kernel is compiled for."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class Recorder:
    """Takes the place of launches. Use it after `pretend`."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.by = ""
        self._known: set[str] = set()

    def start(self) -> None:
        recorder = self

        def note(self: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
            recorder._note(self, args, options)

        JITFunction.run = note  # type: ignore[assignment]

    def stop(self) -> None:
        JITFunction.run = _compile  # type: ignore[method-assign]

    def _note(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        *_, binder = kernel.device_caches[driver.active.get_current_device()]
        _, specialization, used = binder(*arguments, debug=False, instrumentation_mode="", **options)
        constants = [value for value, param in zip(arguments, kernel.params, strict=False) if param.is_constexpr]
        key = f"{kernel.fn.__module__}.{kernel.__name__} {specialization} {constants} {used}"
        if key not in self._known:
            self._known.add(key)
            self.launches.append(Launch(kernel, tuple(map(_without_memory, arguments)), options, self.by))


def _without_memory(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _StandIn(argument.dtype, argument.data_ptr() % 256)
    if isinstance(argument, TensorDescriptor) or hasattr(argument, "base"):
        return replace(argument, base=_without_memory(argument.base))
    return argument


def compile_all(launches: Sequence[Launch], processes: int) -> Iterator[tuple[Launch, Compiled]]:
    """Compile in processes that are forked, since launches hold functions of this one; yield results as they come."""
    global _waiting
    _waiting = launches
    with get_context("fork").Pool(processes) as pool:
        for index, found in pool.imap_unordered(_compile_one, range(len(launches))):
            yield launches[index], found


_waiting: Sequence[Launch] = ()


def _compile_one(index: int) -> tuple[int, Compiled]:
    launch = _waiting[index]
    try:
        kernel = _compile(launch.kernel, *launch.arguments, grid=(1,), warmup=True, **launch.options)
        return index, Compiled(kernel.metadata.shared, *_resources(kernel.asm["cubin"]))
    except Exception as error:  # what does not compile is a result
        lines = [line for line in str(error).splitlines() if line.strip()]
        return index, Compiled(error=f"{type(error).__name__}: {' '.join(lines[-3:])[-300:]}")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes of its stack, as the disassembler says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    found = _USED.search(text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
